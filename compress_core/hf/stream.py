"""Runs a model one block at a time, so that no more than one block's weights are in memory.

The model's own forward runs once per batch with every block replaced by a stub that notes its
arguments (masks, positions) and hands the hidden states on; the real blocks then run in turn.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from compress_core.errors import ModelError, NumericsError
from compress_core.head import forward_of
from compress_core.hf.ahead import AheadCheckpoint
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import load_config
from compress_core.hf.model_code import model_code
from compress_core.hf.observe import tensors_in
from compress_core.hf.states import Room
from compress_core.hf.stub import Call, Stub, with_hidden
from compress_core.stats import InputAccumulator, InputStats
from compress_core.types import ModelLayout

Progress = Callable[[int, int], None]  # samples done, samples in all


def drop_parameters(module: nn.Module) -> None:
    """Frees the weights but keeps the buffers, which no file may hold."""
    for part in module.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)


class BlockStream:
    """A model on disk, runnable block by block.

    Args:
        checkpoint: The dense model.
        layout: Its layout.
        device: Where blocks run.
        trust_remote_code: Passed to transformers.
        dtype: In which blocks run and hidden states are kept; None is the model's own.
        room: Where hidden states are kept.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: ModelLayout,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        dtype: str | None = None,
        room: Room | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.layout = layout
        self.device = torch.device(device)
        self.room = room or Room()
        self.dtype = getattr(torch, dtype or layout.dtype)
        with init_empty_weights(include_buffers=False), no_init_weights():
            self.model = AutoModelForCausalLM.from_config(
                load_config(checkpoint, trust_remote_code),
                dtype=self.dtype,
                trust_remote_code=trust_remote_code,
            ).eval()
        for parameter in self.model.parameters():  # nothing is drawn for what has no memory
            parameter._is_hf_initialized = True
        self.model.init_weights()  # buffers, and what is tied
        self._blocks = [self.model.get_submodule(path) for path in layout.blocks]
        self._order: list[Stub] = []
        self._stubs = [
            Stub(block, self._order, length)
            for block, length in zip(self._blocks, layout.output_lengths, strict=True)
        ]
        container = self.model.get_submodule(layout.blocks[0].rpartition(".")[0])
        assert isinstance(container, nn.ModuleList)
        for index, stub in enumerate(self._stubs):
            container[index] = stub
        self._load(self.model.base_model, layout.outer_parameters)
        self._calls: dict[torch.Size, list[Call]] = {}  # of a batch -> call of each block

    @classmethod
    def reading_ahead(
        cls,
        folder: Path,
        layout: ModelLayout,
        device: torch.device | str,
        trust_remote_code: bool,
        dtype: str | None,
        room: Room | None,
    ) -> "BlockStream":
        """That of a dense model's folder: while one block computes, the next one is read."""
        blocks = [[layout.stored[name] for name in names] for names in layout.block_parameters]
        checkpoint = AheadCheckpoint(folder, blocks, torch.device(device).type == "cuda")
        return cls(checkpoint, layout, device, trust_remote_code, dtype, room)

    @torch.no_grad()
    def embed(self, tokens: Tensor, batch_size: int) -> Tensor:
        """Hidden states that enter block 0.

        Args:
            tokens: (samples, length) token ids.
            batch_size: Samples per forward.

        Returns:
            (samples, length, hidden) on the CPU, in the stream's dtype, where the room has place.

        Raises:
            ModelError: The model does more between its blocks than hand hidden states on, or fails.
        """
        self.prepare(tokens, batch_size)
        batches = tokens.split(batch_size)
        first, _ = self._outer(batches[0])
        states = self.room.empty((*tokens.shape, first.shape[-1]), self.dtype)
        for place, batch in zip(states.split(batch_size), batches, strict=True):
            place.copy_(self._outer(batch)[0])
        return states

    @torch.no_grad()
    def prepare(self, tokens: Tensor, batch_size: int) -> None:
        """Notes what blocks are called with for each size of batch; needed before any block runs.

        Raises:
            ModelError: As :meth:`embed`.
        """
        batches = tokens.split(batch_size)
        for batch in (batches[0], batches[-1]):
            if batch.shape in self._calls:
                continue
            _, calls = self._outer(batch)
            _, others = self._outer(batch.roll(1, dims=1))
            for call, other in zip(calls, others, strict=True):
                self._refuse_token_inputs(call, other)
            self._calls[batch.shape] = calls

    @torch.no_grad()
    def run_block(
        self,
        block: int,
        hidden: Tensor,
        batch_size: int,
        taps: Iterable[str] = (),
        products: torch.dtype = torch.float64,
        progress: Progress | None = None,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> dict[str, InputStats]:
        """Advances ``hidden`` through one block in place, measuring the inputs of ``taps``.

        Args:
            block: Index of the block.
            hidden: (samples, length, hidden) on the CPU; replaced by the block's output.
            batch_size: Samples per forward; :meth:`prepare` was called with the same.
            taps: Names of linear layers whose inputs are measured.
            products: Dtype of one batch's products.
            progress: Called after each batch.
            watch: Called with what entered and what left the block, batch by batch.

        Raises:
            NumericsError: A value is not finite; names the layer and the sample.
            ModelError: The block itself raises something.
        """
        done = 0
        with (
            self.loaded(block),
            self._measure(block, taps, products, lambda: done, hidden, batch_size) as sums,
        ):
            for batch in hidden.split(batch_size):
                output = self.forward(block, batch)
                if watch is not None:
                    watch(batch, output)
                batch.copy_(output)
                done += len(batch)
                if progress is not None:
                    progress(done, len(hidden))
        return {name: sums[name].finish() for name in sums}

    @contextmanager
    def loaded(self, block: int) -> Iterator[nn.Module]:
        """A block with its dense weights, which are freed when the context ends."""
        module = self._blocks[block]
        self._load(module, self.layout.block_parameters[block], self.layout.blocks[block])
        try:
            yield module
        finally:
            drop_parameters(module)

    @torch.no_grad()
    def forward(self, block: int, batch: Tensor) -> Tensor:
        """Output (samples, length, hidden) of a loaded block; :meth:`prepare` knew this size.

        Raises:
            ModelError: The block itself raises something.
        """
        args, kwargs = with_hidden(self._calls[batch.shape[:2]][block], batch.to(self.device))
        with model_code(f"{self.layout.architecture} fails in {self.layout.blocks[block]}"):
            output = self._blocks[block](*args, **kwargs)
        return output[0] if self.layout.output_lengths[block] else output

    @contextmanager
    def behind(self, hidden: Tensor) -> Iterator[Any]:
        """The model, whose base model makes its output of what left the last block.

        Args:
            hidden: (samples, length, hidden) of the tokens that the base model is then given.
        """
        first = self._stubs[0]
        with forward_of(first, lambda *_, **__: first.output(hidden.to(self.device))):
            yield self.model
        self._forget()

    def load_head(self) -> None:
        """Puts what the model's class has behind its base model on the device."""
        layout, model = self.layout, self.model
        blocks = tuple(f"{path}." for path in layout.blocks)
        base = {*layout.outer_parameters, *layout.outer_buffers}
        names = [n for n in layout.stored if n not in base and not n.startswith(blocks)]
        held = {layout.stored[name]: model.get_parameter(name) for name in layout.outer_parameters}
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module, key = model.get_submodule(owner), layout.stored[name]
            if leaf in module._buffers:
                buffer = module.get_buffer(leaf)
                module._buffers[leaf] = self.checkpoint.read(key).to(self.device, buffer.dtype)
            else:  # a tied head is the embedding
                module._parameters[leaf] = held[key] if key in held else self._parameter(key)

    @contextmanager
    def _measure(
        self,
        block: int,
        taps: Iterable[str],
        products: torch.dtype,
        first_sample: Callable[[], int],
        hidden: Tensor,
        batch_size: int,
    ) -> Iterator[dict[str, InputAccumulator]]:
        widths = {layer.name: layer.in_features for layer in self.layout.of_block(block)}
        sums = {tap: InputAccumulator(widths[tap], self.device, products) for tap in taps}

        def hook_for(tap: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                rows = min(batch_size, len(hidden) - first_sample())
                try:
                    sums[tap].add(args[0].reshape(rows, -1, widths[tap]), first_sample())
                except NumericsError as error:
                    raise NumericsError(f"layer {tap}: {error}") from None

            return hook

        root = self._blocks[block]
        inside = len(self.layout.blocks[block]) + 1
        handles = [
            root.get_submodule(tap[inside:]).register_forward_pre_hook(hook_for(tap))
            for tap in sums
        ]
        try:
            yield sums
        finally:
            for handle in handles:
                handle.remove()

    def _outer(self, batch: Tensor) -> tuple[Tensor, list[Call]]:
        """One pass of everything but the blocks.

        Returns:
            The hidden states that enter block 0, and what else each block is called with.
        """
        self._order.clear()
        with model_code(f"{self.layout.architecture} cannot be run block by block"):
            self.model.base_model(input_ids=batch.to(self.device), use_cache=False)
        if self._order != self._stubs:
            raise ModelError(
                f"{self.layout.architecture} does not run each of its blocks once and in order, so "
                "it cannot be run block by block"
            )
        for before, after in zip(self._stubs, self._stubs[1:], strict=False):
            if not before.hands_on_to(after):
                raise ModelError(
                    f"{self.layout.architecture} changes hidden states between its blocks, so it "
                    "cannot be run block by block"
                )
        hidden = self._stubs[0].received
        assert hidden is not None
        self._forget()
        return hidden, [stub.call for stub in self._stubs]

    def _forget(self) -> None:
        """Lets go of hidden states: one batch of them per block is too much."""
        for stub in self._stubs:
            stub.received = stub.passed = None

    def _refuse_token_inputs(self, call: Call, other: Call) -> None:
        pairs = zip(tensors_in(call), tensors_in(other), strict=True)
        if any(not torch.equal(a, b) for a, b in pairs):
            raise ModelError(
                f"the blocks of {self.layout.architecture} read more of the tokens than their "
                "hidden states, so it cannot be run block by block"
            )

    def _load(self, module: nn.Module, names: Iterable[str], path: str = "") -> None:
        """Puts the named parameters and the module's buffers on the device."""
        root = self.model if not path else module
        for name in names:
            owner, _, leaf = name[len(path) + 1 if path else 0 :].rpartition(".")
            parameter = self._parameter(self.layout.stored[name])
            root.get_submodule(owner)._parameters[leaf] = parameter
        place = path or ("" if module is self.model else self.layout.base_prefix)
        for name, buffer in list(module.named_buffers()):
            key = self.layout.stored.get(f"{place}.{name}".lstrip("."))
            if key is not None:
                buffer = self.checkpoint.read(key).to(buffer.dtype)
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)

    def _parameter(self, key: str) -> nn.Parameter:
        tensor = self.checkpoint.read(key).to(self.device, self.dtype, non_blocking=True)
        return nn.Parameter(tensor, requires_grad=False)
