"""A layer that keeps its whole weight, to be rounded behind layers that are rounded already."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.fit import PREFIX, Moments, Start


@dataclass(frozen=True)
class KeepWhole:
    """Nothing is cut; what is measured behind earlier layers is read where numbers are rounded."""

    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """The weight as a base."""
        return of_whole(weight)


def of_whole(weight: Tensor) -> LowRank:
    """A layer of its weight (out, in) alone: factors of rank 0 beside it."""
    out, inputs = weight.shape
    return LowRank(weight.new_zeros(out, 0), weight.new_zeros(0, inputs), base=weight)
