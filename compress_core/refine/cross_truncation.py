"""SAES-SVD's truncation (arXiv 2602.03051): rank k that also makes up for earlier layers' errors.

min ‖u v X − W X‖² + α ‖u v X − W X_dense‖² over rank k. With H = E[x xᵀ], Δ = E[(x_dense − x) xᵀ]
and β = α / (1 + α) this is the best rank-k fit of T = W (H + β Δ): u = top eigenvectors of T H⁺ Tᵀ
and v = uᵀ T H⁺, which needs no root of H.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress_core.decompose import LowRank, project
from compress_core.errors import ConfigError
from compress_core.fit import PREFIX, Moments, Start, start_factors
from compress_core.metric import SecondMoment
from compress_core.refine.inverse import inverse
from compress_core.refine.least_squares import INPUT_FLOOR


@dataclass(frozen=True)
class CrossTruncate:
    """The rule above, with β in closed form (the paper's ACES).

    β minimises the share of the target's energy outside the best rank-k subspace at β = 0,
    (a + 2bβ + cβ²) / (A + 2Bβ + Cβ²), among the values that α in [least, most] allows.

    Attributes:
        least: Smallest α, 0.25 in the paper.
        most: Largest α, 0.75 in the paper.
    """

    least: float = 0.25
    most: float = 0.75
    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most < math.inf:
            raise ConfigError(
                f"alpha needs 0 <= alpha_least <= alpha_most, got {self.least:g} and {self.most:g}"
            )

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """A truncation of the same rank; of ``factors`` only the rank matters."""
        factors = start_factors(start)
        gram, cross = moments.prefix, moments.cross
        assert gram is not None and cross is not None
        inverted = inverse(gram, INPUT_FLOOR)
        own, lag = weight @ gram, weight @ (cross - gram)  # W H and W Δ
        q, _, _ = project(weight, SecondMoment(gram), factors.rank)
        pairs = [(own, weight), (lag, weight), (lag @ inverted, lag)]  # S Sᵀ, D Sᵀ and D Dᵀ
        target = own + self._beta(pairs, q) * lag
        u, along, _ = project(target, SecondMoment(inverted), factors.rank)
        return LowRank(u, along @ inverted)

    def _beta(self, pairs: Sequence[tuple[Tensor, Tensor]], q: Tensor) -> float:
        """Closed form of ACES.

        Args:
            pairs: S Sᵀ, D Sᵀ and D Dᵀ, each as what its two factors are, (out, in).
            q: Orthonormal (out, rank), of the best subspace at β = 0.
        """
        whole = [float((x * y).sum()) for x, y in pairs]
        inside = [float(((q.T @ x) * (q.T @ y)).sum()) for x, y in pairs]
        outside = [total - part for total, part in zip(whole, inside, strict=True)]
        (a, b, c), (big_a, big_b, big_c) = outside, whole
        low, high = (alpha / (1 + alpha) for alpha in (self.least, self.most))
        candidates = [low, high]
        square, linear = c * big_b - b * big_c, c * big_a - a * big_c
        constant = b * big_a - a * big_b
        under_root = linear**2 - 4 * square * constant
        if square != 0 and under_root >= 0:
            roots = [(-linear + sign * under_root**0.5) / (2 * square) for sign in (1, -1)]
            candidates += [root for root in roots if low < root < high]

        def energy_outside(beta: float) -> float:
            all_of_it = big_a + 2 * big_b * beta + big_c * beta**2
            return (a + 2 * b * beta + c * beta**2) / all_of_it if all_of_it > 0 else 0.0

        return min(candidates, key=energy_outside)
