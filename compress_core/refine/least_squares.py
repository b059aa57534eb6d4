"""Closed-form updates of one factor with the other fixed, in covariance form.

For min ‖u v X − W X_target‖² with H = E[x xᵀ] and T = E[x_target xᵀ]:
u ← W T vᵀ (v H vᵀ)⁺ and v ← u⁺ W T H⁺. Where the target is the layer's own input, T = H and the
second is u⁺ W: X drops out. With the H that the truncation was optimal for, both change nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError
from compress_core.fit import PREFIX, Moments, Start, start_factors
from compress_core.refine.inverse import inverse

SMALL_FLOOR = 1e-8  # of v H vᵀ, rank by rank
INPUT_FLOOR = 1e-6  # of H itself: float32 activations know their directions no better


def update_out(weight: Tensor, v: Tensor, target: Tensor, gram: Tensor) -> Tensor:
    """u (out, rank) for fixed v (rank, in); ``target`` is T and ``gram`` is H, both (in, in)."""
    return weight @ (target @ v.T) @ inverse(v @ gram @ v.T, SMALL_FLOOR)


def update_in(weight: Tensor, u: Tensor, target: Tensor, gram: Tensor) -> Tensor:
    """v (rank, in) for fixed u (out, rank); arguments as of :func:`update_out`."""
    projected = torch.linalg.pinv(u, rtol=SMALL_FLOOR) @ weight
    return projected if target is gram else projected @ target @ inverse(gram, INPUT_FLOOR)


@dataclass(frozen=True)
class Alternate:
    """Updates u, then v, so often.

    Attributes:
        sweeps: Times that both are updated; 0 updates u once and leaves v.
        toward_dense: What the layer is fitted to: 0 is its own output on the inputs it has, 1 its
            output in the dense model, and between them the mix of both.
    """

    sweeps: int = 1
    toward_dense: float = 0.0
    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def __post_init__(self) -> None:
        if not 0 <= self.toward_dense <= 1:
            raise ConfigError(f"toward_dense is in [0, 1], got {self.toward_dense:g}")

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """Least squares of one factor after the other."""
        factors = start_factors(start)
        gram, cross = moments.prefix, moments.cross
        assert gram is not None and cross is not None
        target = gram
        if self.toward_dense > 0:
            target = (1 - self.toward_dense) * gram + self.toward_dense * cross
        u, v = factors.u, factors.v
        if self.sweeps == 0:
            return LowRank(update_out(weight, v, target, gram), v)
        for _ in range(self.sweeps):
            u = update_out(weight, v, target, gram)
            v = update_in(weight, u, target, gram)
        return LowRank(u, v)
