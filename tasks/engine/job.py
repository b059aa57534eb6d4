"""One method at one budget on one model: what all stages of a run have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from compress_core.method import Method
from compress_core.types import LayerRef, Stack
from storage.artifact import Artifact
from tasks.engine.dense_model import DenseModel
from tasks.stages.arrays import get_tensor


@dataclass(frozen=True)
class Job:
    """What is done to which model.

    Attributes:
        model: The dense model.
        method: One choice per stage.
        kept: Share of the compressible parameters that stays.
        samples: Calibration windows.
        length: Tokens per window.
        batch_size: Windows per forward; never part of a key.
        products: Dtype of one batch's statistics.
        seed: Of the shuffle of stack-of-batch calibration.
        learn_seed: Of a method's own training.
    """

    model: DenseModel
    method: Method
    kept: float
    samples: int
    length: int
    batch_size: int
    products: str
    seed: int
    learn_seed: int = 0

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """What is decomposed as one, by the stack's name."""
        return {
            stack.as_layer.name: stack for stack in self.method.stacks(self.model.layout.layers)
        }

    @cached_property
    def layers(self) -> list[LayerRef]:
        """The stacks as decompositions and allocators see them."""
        return [stack.as_layer for stack in self.stacks.values()]

    @cached_property
    def stack_of(self) -> dict[str, str]:
        """Layer to the stack it is in."""
        return {
            member.name: name for name, stack in self.stacks.items() for member in stack.members
        }

    def rows(self, layer: LayerRef) -> slice:
        """Where a layer's rows are in its stack."""
        start = 0
        for member in self.stacks[self.stack_of[layer.name]].members:
            if member.name == layer.name:
                break
            start += member.out_features
        return slice(start, start + layer.out_features)

    def weight(self, layer: LayerRef) -> Tensor:
        """A layer's dense weight (out, in), as stored."""
        weight = self.model.checkpoint.read(self.model.weight_key(layer.name))
        return weight.T if layer.transposed else weight


def reader(source: Artifact) -> Callable[[str, int], Tensor]:
    """Reads the first rows of a decomposition's arrays."""

    def read(name: str, rows: int) -> Tensor:
        return get_tensor(source, name, rows=rows)

    return read
