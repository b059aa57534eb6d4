"""Least squares for a layer of factors and sparse entries whose rank and places are settled.

min over L of rank r and S on the mask of ‖(L + S) X − Y‖², Y what the layer should give: with
P = E[x xᵀ] and T = E[y xᵀ] that is tr(W′ P W′ᵀ) − 2 tr(W′ Tᵀ), W′ = L + S. By turns: the rows of S
by conjugate gradients within the mask, all rows at once (SparseGPT solves the same greedily, column
after column, arXiv 2301.00774), and L by the optimal truncation of what is left. With a ridge on P
no turn makes the error larger; without one, directions that the inputs hardly have count as none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_core.decompose import LowRank, project
from compress_core.errors import ConfigError
from compress_core.fit import DENSE, PREFIX, Moments, Start, start_factors
from compress_core.metric import SecondMoment
from compress_core.refine.inverse import inverse
from compress_core.sparse import Sparse

FLOOR = 1e-6  # of the largest eigenvalue: directions that float32 activations do not know


@dataclass(frozen=True)
class MaskedLeastSquares:
    """Factors and values fitted by turns, on the dense model's inputs.

    Attributes:
        turns: Times that factors and entries are fitted one after the other.
        steps: Of conjugate gradients in a turn.
        damp: Added to P, as part of its mean diagonal, with the dense weight as what it pulls to.
    """

    turns: int = 3
    steps: int = 30
    damp: float = 1e-3
    reads: ClassVar[frozenset[str]] = frozenset({DENSE})

    def __post_init__(self) -> None:
        if self.turns < 1 or self.steps < 1 or self.damp < 0:
            raise ConfigError("a refit needs at least one turn and one step, and damp >= 0")

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """Factors and values of the same rank, at the same places."""
        factors = start_factors(start)
        assert moments.dense is not None
        return self.solve(weight, factors, moments.dense, weight @ moments.dense)

    def solve(self, weight: Tensor, factors: LowRank, p: Tensor, t: Tensor) -> LowRank:
        """The fit itself.

        Args:
            weight: Dense, float64 (out, in).
            factors: Where to begin.
            p: E[x xᵀ], float64 (in, in).
            t: E[y xᵀ], float64 (out, in).
        """
        ridge = self.damp * float(p.diagonal().mean())
        p = p + ridge * torch.eye(len(p), dtype=p.dtype, device=p.device)
        t = t + ridge * weight
        u, v, rank = factors.u, factors.v, factors.rank
        mask = None if factors.sparse is None else factors.sparse.mask
        entries = (
            torch.zeros_like(weight) if factors.sparse is None else factors.sparse.dense().to(t)
        )
        solve = _solver(p, ridge)
        for _ in range(self.turns if mask is not None and rank else 1):
            if mask is not None:
                entries = masked_solve(entries, mask, p, t - u @ (v @ p), self.steps)
            if rank:
                u, v, _ = project(solve(t - entries @ p), SecondMoment(p), rank)
        if mask is None:
            return LowRank(u, v, bias=factors.bias)
        if rank:
            entries = masked_solve(entries, mask, p, t - u @ (v @ p), self.steps)
        return LowRank(u, v, sparse=Sparse.of(entries, mask), bias=factors.bias)


@dataclass(frozen=True)
class PrefixMaskedLeastSquares:
    """The same on inputs behind compressed layers, whose errors it makes up for.

    Attributes:
        toward_dense: Part of the dense model's outputs in what is fitted to, in [0, 1].
        turns: As of :class:`MaskedLeastSquares`.
        steps: As there.
        damp: As there.
    """

    toward_dense: float = 1.0
    turns: int = 3
    steps: int = 30
    damp: float = 1e-3
    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def __post_init__(self) -> None:
        check_part(self.toward_dense)

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """Factors and values of the same rank, at the same places."""
        factors = start_factors(start)
        assert moments.prefix is not None and moments.cross is not None
        part = self.toward_dense
        target = weight @ ((1 - part) * moments.prefix + part * moments.cross)
        fit = MaskedLeastSquares(self.turns, self.steps, self.damp)
        return fit.solve(weight, factors, moments.prefix, target)


def check_part(toward_dense: float) -> None:
    """Refuses a dense model's part in the outputs.

    Raises:
        ConfigError: It is no part.
    """
    if not 0 <= toward_dense <= 1:
        raise ConfigError(f"toward_dense must be in [0, 1], got {toward_dense:g}")


def _solver(p: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """Solves X P = B for B (out, in): exactly where P has a ridge."""
    if ridge > 0:
        factor = torch.linalg.cholesky(p)
        return lambda b: torch.cholesky_solve(b.T, factor).T
    back = inverse(p, FLOOR)
    return lambda b: b @ back


def masked_solve(start: Tensor, mask: Tensor, p: Tensor, t: Tensor, steps: int) -> Tensor:
    """S on the mask with less tr(S P Sᵀ) − 2 tr(S Tᵀ) than ``start``, by conjugate gradients.

    Every row is a system of its own, with the rows and columns of P that its mask names; all are
    done at once, preconditioned by P's diagonal.

    Args:
        start: Where to begin, zero outside the mask, float64 (out, in).
        mask: bool (out, in).
        p: Positive semidefinite, (in, in).
        t: (out, in).
        steps: Of conjugate gradients.
    """
    diagonal, places = p.diagonal(), mask.to(p.dtype)
    scale = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    # In place: what it takes beside the products is time to go through memory.
    found, residual = start.clone(), (t - start @ p).mul_(places)
    direction, preconditioned, moved, product = (torch.zeros_like(t) for _ in range(4))
    strength = direction.new_zeros(len(t), 1)
    for _ in range(steps):
        torch.mul(residual, scale, out=preconditioned)
        now = torch.mul(residual, preconditioned, out=product).sum(1, keepdim=True)
        preconditioned.addcmul_(torch.where(strength > 0, now / strength, 0.0), direction)
        direction, preconditioned, strength = preconditioned, direction, now
        torch.mm(direction, p, out=moved).mul_(places)
        curvature = torch.mul(direction, moved, out=product).sum(1, keepdim=True)
        step = torch.where(curvature > 0, strength / curvature, 0.0)
        found.addcmul_(step, direction)
        residual.addcmul_(step, moved, value=-1)
    return found
