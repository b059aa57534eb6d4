"""A layer that keeps its whole weight, to be rounded behind layers that are rounded already."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.fit import PREFIX, Moments, Start, start_share


@dataclass(frozen=True)
class KeepWhole:
    """Nothing is cut; what is measured behind earlier layers is read where numbers are rounded.

    A share with components leaves room for them: what they are is known once numbers are rounded.
    """

    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """The weight as a base, and beside it as many components of zeros as its share has."""
        return of_whole(weight, start_share(start).rank or 0)


def of_whole(weight: Tensor, rank: int = 0) -> LowRank:
    """A layer of its weight (out, in) alone: factors of zeros beside it."""
    out, inputs = weight.shape
    return LowRank(weight.new_zeros(out, rank), weight.new_zeros(rank, inputs), base=weight)
