"""Refits of factors and entries to the weight itself, without least squares on inputs.

A component that does not stay takes away what the entries had left to it. ``Anchor`` gives every
kept entry the value that makes the layer's weight that of the dense model there: S ← W − L on its
support. ``Turns`` goes on as OATS does (arXiv 2409.13652): L is the best of its rank for W − S,
then S the largest entries of each row of W − L, as many in all as before, so that places move and
counts do not. After the first, no turn makes ‖(W − L − S) D‖ larger, D being 1 or the root mean
square of the inputs. Within rows as in Wanda and OATS: the largest of a whole layer leave some
outputs next to nothing.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError
from compress_core.fit import DENSE, Fitter, Moments, Start, start_factors
from compress_core.prune.alternate import truncate
from compress_core.prune.select import best_of_rows
from compress_core.sparse import Sparse

FLOOR = 1e-3  # of the mean scale of inputs: a dead one is never divided by zero


class Refit(Fitter, Protocol):
    """What all of them are beside fitters."""

    scaled: ClassVar[bool]  # whether the scale of the inputs is read

    def solve(self, weight: Tensor, factors: LowRank, d: Tensor) -> LowRank:
        """Fits factors and entries to the weight, inputs counting by their scale ``d`` (in,)."""
        ...


@dataclass(frozen=True)
class Anchor:
    """Entries of W − L in their places."""

    reads: ClassVar[frozenset[str]] = frozenset()
    scaled: ClassVar[bool] = False

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """The same factors, and entries at which nothing is left of the weight."""
        return self.solve(weight, start_factors(start), torch.ones_like(weight[0]))

    def solve(self, weight: Tensor, factors: LowRank, d: Tensor) -> LowRank:
        """The fit itself, as :meth:`Turns.solve`; it is the same in every scale."""
        if factors.sparse is None:
            return factors
        entries = Sparse.of(weight - factors.u @ factors.v, factors.sparse.mask)
        return LowRank(factors.u, factors.v, sparse=entries, bias=factors.bias)


@dataclass(frozen=True)
class Turns:
    """Truncation and threshold by turns, every input counting the same.

    Attributes:
        turns: Times that both parts are fitted.
    """

    turns: int = 30
    reads: ClassVar[frozenset[str]] = frozenset()
    scaled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ConfigError(f"a refit needs at least one turn, got {self.turns}")

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """Factors of the same rank, and as many entries, in places of their own."""
        return self.solve(weight, start_factors(start), torch.ones_like(weight[0]))

    def solve(self, weight: Tensor, factors: LowRank, d: Tensor) -> LowRank:
        """The fit itself.

        Args:
            weight: Dense, float64 (out, in).
            factors: Where to begin.
            d: Scale of every input, positive (in,).
        """
        if factors.sparse is None:
            return factors
        scaled, u, v = weight * d, factors.u, factors.v * d
        mask, count = factors.sparse.mask, factors.sparse.nonzeros
        rest = (scaled - u @ v) * mask
        for _ in range(self.turns if factors.rank else 1):
            u, v = truncate(scaled - rest, factors.rank)
            rest = scaled - u @ v
            mask = best_of_rows(rest.abs(), count)
            rest = rest * mask
        return LowRank(u, v / d, sparse=Sparse.of(rest / d, mask), bias=factors.bias)


@dataclass(frozen=True)
class ScaledTurns:
    """The same on W D, D the root mean square of the dense model's inputs.

    Attributes:
        turns: As of :class:`Turns`.
    """

    turns: int = 30
    reads: ClassVar[frozenset[str]] = frozenset({DENSE})
    scaled: ClassVar[bool] = True

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """Factors of the same rank, and as many entries, in places of their own."""
        assert moments.dense is not None
        return self.solve(weight, start_factors(start), moments.dense.diagonal().sqrt())

    def solve(self, weight: Tensor, factors: LowRank, d: Tensor) -> LowRank:
        """The fit itself, as :meth:`Turns.solve`; ``d`` may be zero for inputs that are."""
        return Turns(self.turns).solve(weight, factors, d.clamp_min(FLOOR * float(d.mean())))


def refit_to_weight(name: str, *, scaled: bool, turns: int = 30) -> Refit | None:
    """The refit of a name, "anchor" or "turns"; None for any other, which reads more.

    Args:
        name: Of the refit.
        scaled: Whether inputs count by their scale.
        turns: Of "turns".
    """
    if name == "turns":
        return ScaledTurns(turns) if scaled else Turns(turns)
    return Anchor() if name == "anchor" else None
