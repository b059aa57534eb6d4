"""What every fitter is: it makes one layer of what it may keep, and of what was measured.

A refiner begins with factors and betters them at the same cost; a pruner begins with the weight
alone, anew for every budget.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError
from compress_core.types import Share

DENSE, PREFIX = "dense", "prefix"  # what a fitter may read
Step = Literal["layer", "block"]


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's input per token, float64 (in, in); a fitter says what it reads.

    Attributes:
        dense: E[x xᵀ] of the dense model's inputs.
        prefix: E[x xᵀ] behind layers that are compressed already.
        cross: E[x_dense xᵀ]; rows belong to the dense model's inputs, columns to the others.
    """

    dense: Tensor | None = None
    prefix: Tensor | None = None
    cross: Tensor | None = None


Start = LowRank | Share
"""What a fit begins with: the decomposition cut to the layer's share, float64, or where nothing is
decomposed beforehand the share itself, which is then never dense."""


class Fitter(Protocol):
    """Makes what one layer stores."""

    reads: ClassVar[frozenset[str]]  # of DENSE, PREFIX

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """What the layer stores: no more numbers than it began with, and just the share's of those.

        Args:
            weight: The dense weight, float64 (out, in).
            start: Factors for a refiner, a share for a pruner.
            moments: At least what it ``reads``.

        Raises:
            NumericsError: A moment from which nothing can be computed.
        """
        ...


def start_factors(start: Start) -> LowRank:
    """What a refiner begins with."""
    assert isinstance(start, LowRank)
    return start


def start_share(start: Start) -> Share:
    """What a pruner begins with."""
    assert isinstance(start, Share)
    return start


@dataclass(frozen=True)
class Prefix:
    """How inputs behind compressed layers are measured.

    Attributes:
        step: "block": a block's inputs are measured once, behind the compressed blocks before it.
            "layer": also the block's own layers are compressed one input after the other, so that
            o_proj is measured behind compressed q, k, v.
        buckets: Stack-of-batch calibration with so many buckets; 0 streams exact statistics.
    """

    step: Step = "block"
    buckets: int = 0

    def __post_init__(self) -> None:
        if self.step not in ("layer", "block"):
            raise ConfigError(f"the prefix grows by 'layer' or by 'block', got {self.step!r}")
        if self.buckets < 0:
            raise ConfigError(f"buckets must be 0 or more, got {self.buckets}")
