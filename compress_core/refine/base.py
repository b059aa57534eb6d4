"""What every refiner is: factors of one layer in, better factors of the same cost out."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError

DENSE, PREFIX = "dense", "prefix"  # what a refiner may read
Step = Literal["layer", "block"]


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's input per token, float64 (in, in); a refiner says what it reads.

    Attributes:
        dense: E[x xᵀ] of the dense model's inputs.
        prefix: E[x xᵀ] behind layers that are compressed already.
        cross: E[x_dense xᵀ]; rows belong to the dense model's inputs, columns to the others.
    """

    dense: Tensor | None = None
    prefix: Tensor | None = None
    cross: Tensor | None = None


class Refiner(Protocol):
    """Betters the factors of one layer."""

    reads: ClassVar[frozenset[str]]  # of DENSE, PREFIX

    def refine(self, weight: Tensor, factors: LowRank, moments: Moments) -> LowRank:
        """Factors that cost no more numbers.

        Args:
            weight: The dense weight, float64 (out, in).
            factors: The decomposition cut to the layer's rank, float64.
            moments: At least what it ``reads``.
        """
        ...


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


def inverse(gram: Tensor, floor: float) -> Tensor:
    """The pseudo-inverse of a symmetric positive semidefinite matrix.

    Args:
        gram: float64 (n, n).
        floor: Eigenvalues below this part of the largest are noise and count as zero.
    """
    return torch.linalg.pinv(gram, rtol=floor, hermitian=True)
