"""Entries in their places by optimal brain surgery, and their values by least squares.

SparseGPT's sweep (arXiv 2301.00774) chooses places as it goes, each removal made up for by the
columns to come; what it leaves of a row's error conjugate gradients within the mask take away, as
in ``refine.masked``. Behind compressed layers the target is the one that ``cross_truncation`` has
(SAES-SVD, arXiv 2602.03051): W (P + β (C − P)), P = E[x xᵀ] there and C = E[x_dense xᵀ].
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError
from compress_core.fit import DENSE, PREFIX, Moments, Start, start_share
from compress_core.prune.obs import check_surgery, damped, remove, upper_factor
from compress_core.prune.wanda import second_moment, without_factors
from compress_core.refine.masked import check_part, masked_solve
from compress_core.sparse import Sparse

BLOCK = 128  # columns whose places are chosen at once


@dataclass(frozen=True)
class FitEntries:
    """On the dense model's inputs.

    Attributes:
        damping: Part of the mean of the second moment's diagonal that is added to it.
        steps: Of conjugate gradients; with 8 a few parts in a hundred of what they gain is left.
    """

    damping: float = 0.01
    steps: int = 8
    reads: ClassVar[frozenset[str]] = frozenset({DENSE})

    def __post_init__(self) -> None:
        check_surgery(self.damping, BLOCK)
        if self.steps < 0:
            raise ConfigError(f"steps of least squares are 0 or more, got {self.steps}")

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """``share.nonzeros`` entries towards the weight's own outputs."""
        gram = second_moment(Moments(prefix=moments.dense))
        return self.solve(weight, start_share(start).nonzeros, gram, weight @ gram)

    def solve(self, weight: Tensor, count: int, gram: Tensor, target: Tensor) -> LowRank:
        """The fit itself.

        Args:
            weight: Dense, float64 (out, in).
            count: Entries that stay.
            gram: E[x xᵀ] (in, in).
            target: E[y xᵀ] (out, in), y what the layer should give.

        Raises:
            NumericsError: The second moment is not positive definite in spite of its damping.
        """
        h = damped(gram, self.damping)
        triangle = upper_factor(h, self.damping)
        # What is added to the second moment pulls to the dense weight.
        target = target + weight @ (h - gram)
        ideal = _divided(target, triangle) * (gram.diagonal() > 0)
        found = remove(ideal, triangle, count, None, BLOCK)
        values = masked_solve(found.dense(), found.mask, h, target, self.steps)
        return without_factors(Sparse.of(values, found.mask))


@dataclass(frozen=True)
class PrefixFitEntries:
    """The same behind layers that are compressed already, whose errors it partly makes up for.

    Attributes:
        toward_dense: β, the dense model's part in the outputs it is fitted to, in [0, 1].
        damping: As of :class:`FitEntries`.
        steps: As there.
    """

    toward_dense: float = 0.5
    damping: float = 0.01
    steps: int = 8
    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def __post_init__(self) -> None:
        FitEntries(self.damping, self.steps)  # it checks
        check_part(self.toward_dense)

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """``share.nonzeros`` entries towards outputs between its own and the dense model's."""
        gram, target = outputs_between(weight, moments, self.toward_dense)
        share = start_share(start)
        return FitEntries(self.damping, self.steps).solve(weight, share.nonzeros, gram, target)


def outputs_between(weight: Tensor, moments: Moments, toward_dense: float) -> tuple[Tensor, Tensor]:
    """E[x xᵀ] (in, in) of inputs behind compressed layers, and E[y xᵀ] (out, in).

    Args:
        weight: Dense, float64 (out, in).
        moments: Of both models' inputs.
        toward_dense: The dense model's part in y; the rest is what the weight makes of x.
    """
    gram, cross = second_moment(moments), moments.cross
    assert cross is not None
    return gram, weight @ torch.lerp(gram, cross, toward_dense)


def _divided(target: Tensor, triangle: Tensor) -> Tensor:
    """T H⁻¹ with H = R Rᵀ."""
    solve = torch.linalg.solve_triangular
    return solve(
        triangle, solve(triangle.T, target, upper=False, left=False), upper=True, left=False
    )
