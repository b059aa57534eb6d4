"""One method at one budget on one model: what all stages of a run have in common."""

from dataclasses import dataclass
from functools import cached_property

from compress_core.method import Method
from compress_core.types import LayerRef, Stack, affordable
from tasks.engine.dense_model import DenseModel


@dataclass(frozen=True)
class Job:
    """What is done to which model.

    Attributes:
        model: The dense model.
        method: One choice per stage.
        kept: Share of the compressible parameters that stays; of what they take in codes, where
            the method has codes of so many bits for all.
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

    def owner(self, layer: LayerRef) -> str:
        """The layer under whose name the in-factor is stored: the first of the stack."""
        return self.stack(layer).members[0].name

    def stack(self, layer: LayerRef) -> Stack:
        """The stack that a layer is in."""
        return self.stacks[self.stack_of[layer.name]]

    def numbers(self, layer: LayerRef) -> int:
        """Numbers that a layer has if all keep the same share."""
        (priced,) = (x for x in self.stack(layer).members if x.name == layer.name)
        return affordable(self.kept, priced.dense_cost)

    @property
    def share(self) -> float:
        """Share of the dense layers' numbers that may be stored: below ``kept`` in codes."""
        dense = sum(layer.dense_cost for layer in self.model.layout.layers)
        return self.kept * sum(layer.dense_cost for layer in self.layers) / dense
