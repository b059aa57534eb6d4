"""The dense model and its compressed counterpart side by side, block by block.

Both read the same tokens; what one layer reads in each of them is measured together, so that the
compressed layer can be fitted to what the dense one gives out.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress_core.errors import NumericsError
from compress_core.hf.stream import BlockStream, Progress
from compress_core.stats import PrefixStats


class PairAccumulator(Protocol):
    """Takes what a layer reads in the dense and in the compressed model."""

    def add(self, dense: Tensor, inputs: Tensor, first_sample: int = 0) -> None:
        """Adds one batch."""
        ...

    def finish(self) -> PrefixStats:
        """The statistics so far."""
        ...


class _Enough(BaseException):
    """Nothing after this layer is wanted; no failure of the model's, so no Exception."""


class PrefixStream:
    """Runs one block of both models.

    Args:
        stream: The dense model; its ``prepare`` was called.
        batch_size: Samples per forward.
    """

    def __init__(self, stream: BlockStream, batch_size: int) -> None:
        self.stream = stream
        self.batch_size = batch_size

    @torch.no_grad()
    def measure(
        self,
        block: int,
        dense: Tensor,
        hidden: Tensor,
        weights: Mapping[str, Tensor],
        sums: Mapping[str, PairAccumulator],
        progress: Progress | None = None,
    ) -> None:
        """Measures the inputs of taps; the hidden states stay as they are.

        Args:
            block: Index of the block.
            dense: (samples, length, hidden) that enter it in the dense model.
            hidden: The same in the compressed model.
            weights: Layer of the block to its compressed weight (out, in); others are dense.
            sums: Tap to what takes its inputs.
            progress: Called after each batch.

        Raises:
            NumericsError: An input is not finite; names the layer and the sample.
        """
        done = 0
        with self.stream.loaded(block) as module:
            for of_dense, batch in self._batches(dense, hidden):
                before = self._inputs(block, module, of_dense, sums)
                with self._compressed(block, module, weights):
                    after = self._inputs(block, module, batch, sums)
                for tap, accumulator in sums.items():
                    try:
                        accumulator.add(before[tap], after[tap], done)
                    except NumericsError as error:
                        raise NumericsError(f"layer {tap}: {error}") from None
                done += len(batch)
                if progress is not None:
                    progress(done, len(hidden))

    @torch.no_grad()
    def advance(
        self, block: int, dense: Tensor, hidden: Tensor, weights: Mapping[str, Tensor]
    ) -> float:
        """Carries both hidden states through the block, in place.

        Args:
            block: Index of the block.
            dense: (samples, length, hidden) of the dense model; replaced by the block's output.
            hidden: The same of the compressed model.
            weights: Layer of the block to its compressed weight (out, in).

        Returns:
            The squared error of the compressed model's output, relative to the dense one's.
        """
        error = energy = 0.0
        with self.stream.loaded(block) as module:
            for of_dense, batch in self._batches(dense, hidden):
                of_dense.copy_(self.stream.forward(block, of_dense))
                with self._compressed(block, module, weights):
                    batch.copy_(self.stream.forward(block, batch))
                error += float((batch.double() - of_dense.double()).square().sum())
                energy += float(of_dense.double().square().sum())
        return error / energy if energy > 0 else 0.0

    def _batches(self, dense: Tensor, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(dense.split(self.batch_size), hidden.split(self.batch_size), strict=True)

    def _inputs(
        self, block: int, module: nn.Module, batch: Tensor, sums: Mapping[str, PairAccumulator]
    ) -> dict[str, Tensor]:
        """What the taps read, (samples, length, in); the forward ends when all have been seen."""
        seen: dict[str, Tensor] = {}

        def hook_for(tap: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                seen[tap] = args[0].reshape(len(batch), -1, args[0].shape[-1]).clone()
                if len(seen) == len(sums):
                    raise _Enough

            return hook

        handles = [
            self._module(block, module, tap).register_forward_pre_hook(hook_for(tap))
            for tap in sums
        ]
        try:
            self.stream.forward(block, batch)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @contextmanager
    def _compressed(
        self, block: int, module: nn.Module, weights: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """The block with compressed weights in place of dense ones."""
        transposed = {layer.name: layer.transposed for layer in self.stream.layout.of_block(block)}
        held = {}
        for name, weight in weights.items():
            layer = self._module(block, module, name)
            held[name] = layer._parameters["weight"]
            stored = weight.T if transposed[name] else weight
            stored = stored.to(self.stream.device, self.stream.dtype)
            layer._parameters["weight"] = nn.Parameter(stored, requires_grad=False)
        try:
            yield
        finally:
            for name, parameter in held.items():
                self._module(block, module, name)._parameters["weight"] = parameter

    def _module(self, block: int, module: nn.Module, layer: str) -> nn.Module:
        return module.get_submodule(layer[len(self.stream.layout.blocks[block]) + 1 :])
