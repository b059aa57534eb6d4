"""Runs a model one block at a time, so that no more than one block's weights are in memory.

The model's own forward runs once per batch with every block replaced by a stub that notes its
arguments (masks, positions) and hands the hidden states on; the real blocks then run in turn.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress_core.errors import ModelError, NumericsError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import load_config
from compress_core.hf.model_code import model_code
from compress_core.hf.observe import tensors_in
from compress_core.stats import InputAccumulator, InputStats
from compress_core.types import ModelLayout

Progress = Callable[[int, int], None]  # samples done, samples in all
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with


class _Stub(nn.Module):
    """Stands in for a block: notes what it was called with and returns its input.

    Args:
        block: What it stands in for; a model may ask its blocks for more than their output.
        order: Told of every call, by all stubs of a model.
        output_length: Of the tuple that the block returns; 0 for hidden states by themselves.
    """

    def __init__(self, block: nn.Module, order: list["_Stub"], output_length: int) -> None:
        super().__init__()
        self.block = (block,)  # in a tuple, or it would be a submodule
        self.order = order
        self.output_length = output_length
        self.call: Call = ((), {})
        self.received: Tensor | None = None
        self.passed: Tensor | None = None
        self.version = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.order.append(self)
        self.received = args[0] if args else kwargs["hidden_states"]
        self.call = _with_hidden((args, kwargs), None)
        self.passed = self.received.view_as(self.received)  # a new object: the chain can be checked
        self.version = self.passed._version
        return self.output(self.passed)

    def output(self, hidden: Tensor) -> Any:
        """Hidden states as the block would return them, with nothing beside them."""
        length = self.output_length
        return (hidden, *[None] * (length - 1)) if length else hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block[0], name)

    def hands_on_to(self, other: "_Stub") -> bool:
        """Whether what this one returned is what the other one received, untouched."""
        passed = self.passed
        return passed is not None and passed is other.received and passed._version == self.version


def _with_hidden(call: Call, hidden: Tensor | None) -> Call:
    args, kwargs = call
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})


def _drop_parameters(module: nn.Module) -> None:
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
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: ModelLayout,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        dtype: str | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.layout = layout
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype or layout.dtype)
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(
                load_config(checkpoint, trust_remote_code),
                dtype=self.dtype,
                trust_remote_code=trust_remote_code,
            ).eval()
        self._blocks = [self.model.get_submodule(path) for path in layout.blocks]
        self._order: list[_Stub] = []
        self._stubs = [
            _Stub(block, self._order, length)
            for block, length in zip(self._blocks, layout.output_lengths, strict=True)
        ]
        container = self.model.get_submodule(layout.blocks[0].rpartition(".")[0])
        assert isinstance(container, nn.ModuleList)
        for index, stub in enumerate(self._stubs):
            container[index] = stub
        self._load(self.model.base_model, layout.outer_parameters)
        self._calls: dict[int, list[Call]] = {}  # rows of a batch -> call of each block

    @torch.no_grad()
    def embed(self, tokens: Tensor, batch_size: int) -> Tensor:
        """Hidden states that enter block 0.

        Args:
            tokens: (samples, length) token ids.
            batch_size: Samples per forward.

        Returns:
            (samples, length, hidden) on the CPU, in the stream's dtype.

        Raises:
            ModelError: The model does more between its blocks than hand hidden states on, or fails.
        """
        self.prepare(tokens, batch_size)
        return torch.cat([self._outer(batch)[0].cpu() for batch in tokens.split(batch_size)])

    @torch.no_grad()
    def prepare(self, tokens: Tensor, batch_size: int) -> None:
        """Notes what blocks are called with for each size of batch; needed before any block runs.

        Raises:
            ModelError: As :meth:`embed`.
        """
        batches = tokens.split(batch_size)
        for batch in (batches[0], batches[-1]):
            if len(batch) in self._calls:
                continue
            _, calls = self._outer(batch)
            _, others = self._outer(batch.roll(1, dims=1))
            for call, other in zip(calls, others, strict=True):
                self._refuse_token_inputs(call, other)
            self._calls[len(batch)] = calls

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
            _drop_parameters(module)

    @torch.no_grad()
    def forward(self, block: int, batch: Tensor) -> Tensor:
        """Output (samples, length, hidden) of a loaded block; :meth:`prepare` knew this size.

        Raises:
            ModelError: The block itself raises something.
        """
        args, kwargs = _with_hidden(self._calls[len(batch)][block], batch.to(self.device))
        with model_code(f"{self.layout.architecture} fails in {self.layout.blocks[block]}"):
            output = self._blocks[block](*args, **kwargs)
        return output[0] if self.layout.output_lengths[block] else output

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
        for stub in self._stubs:
            stub.received = stub.passed = None  # one batch of hidden states per block is too much
        return hidden, [stub.call for stub in self._stubs]

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
            tensor = self.checkpoint.read(self.layout.stored[name])
            owner, _, leaf = name[len(path) + 1 if path else 0 :].rpartition(".")
            value = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
            root.get_submodule(owner)._parameters[leaf] = value
        place = path or ("" if module is self.model else self.layout.base_prefix)
        for name, buffer in list(module.named_buffers()):
            key = self.layout.stored.get(f"{place}.{name}".lstrip("."))
            if key is not None:
                buffer = self.checkpoint.read(key).to(buffer.dtype)
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)
