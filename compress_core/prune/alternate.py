"""Sparse plus low rank by turns: each part is fitted to what the other leaves of the weight."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_core.decompose import LowRank, eigen_descending, project
from compress_core.errors import ConfigError
from compress_core.fit import PREFIX, Moments, Start, start_share
from compress_core.metric import SecondMoment
from compress_core.prune.obs import check_surgery, damped, remove, upper_factor
from compress_core.prune.select import UNSTRUCTURED, read_pattern, select_rows
from compress_core.prune.wanda import input_scale, second_moment
from compress_core.sparse import Sparse
from compress_core.types import Share

BETTER = 1e-9  # relative fall in error that is more than rounding


@dataclass(frozen=True)
class Oats:
    """Alternating thresholding of the scaled weight (OATS, arXiv 2409.13652).

    Attributes:
        iterations: Times that both parts are fitted.
        pattern: Of the sparse part: "unstructured", or N:M.
    """

    iterations: int = 80
    pattern: str = UNSTRUCTURED
    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def __post_init__(self) -> None:
        check_turns(self.iterations)
        read_pattern(self.pattern)

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """Factors of ``share.rank`` and ``share.nonzeros`` entries beside them."""
        share = start_share(start)
        scale = input_scale(moments)
        parts = self.turns(weight * scale, share, lambda error: None)
        return unscaled(parts, scale)

    def turns(self, scaled: Tensor, share: Share, told: Callable[[float], None]) -> LowRank:
        """Both parts of a matrix (out, in), each the best for the other, in plain squared error.

        Args:
            scaled: W D, float64 (out, in).
            share: Rank and entries.
            told: Is given the squared error after every turn.
        """
        rank, pattern = share.rank or 0, read_pattern(self.pattern)
        sparse = torch.zeros_like(scaled)
        for _ in range(self.iterations if rank else 1):
            u, v = truncate(scaled - sparse, rank)
            rest = scaled - u @ v
            mask = select_rows(rest.abs(), share.nonzeros, pattern)
            sparse = rest * mask
            told(float((rest - sparse).square().sum()))
        return LowRank(u, v, sparse=Sparse.of(sparse, mask))


@dataclass(frozen=True)
class HassleFree:
    """SparseGPT and truncation by turns, both in the metric H (arXiv 2502.00899).

    Attributes:
        iterations: Times that both parts are fitted; the best is taken.
        damping: Part of the mean of H's diagonal that is added to it.
        own_damping: Part of each diagonal entry that is added to itself.
        blocksize: Columns of the sweep's blocks.
        pattern: Of the sparse part: "unstructured", or N:M.
    """

    iterations: int = 80
    damping: float = 0.005
    own_damping: float = 0.005
    blocksize: int = 128
    pattern: str = UNSTRUCTURED
    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def __post_init__(self) -> None:
        check_turns(self.iterations)
        check_surgery(self.damping, self.blocksize)
        if not 0 <= self.own_damping < float("inf"):
            raise ConfigError(f"own_damping is 0 or more, got {self.own_damping:g}")
        read_pattern(self.pattern)

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """Factors of ``share.rank`` and ``share.nonzeros`` entries beside them."""
        share = start_share(start)
        gram = second_moment(moments)
        h, read = damped(gram, self.damping, self.own_damping), weight * (gram.diagonal() > 0)
        return self.turns(read, share, h, lambda error: None)

    def turns(
        self, weight: Tensor, share: Share, h: Tensor, told: Callable[[float], None]
    ) -> LowRank:
        """The best of all turns by ‖(W − S − u v) H^½‖².

        Args:
            weight: float64 (out, in).
            share: Rank and entries.
            h: Positive definite (in, in).
            told: Is given the least squared error so far after every turn.
        """
        rank, pattern = share.rank or 0, read_pattern(self.pattern)
        triangle, metric = upper_factor(h, self.damping), SecondMoment(h)
        u, v = weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1])
        best, least = None, float("inf")
        for _ in range(self.iterations if rank else 1):
            sparse = remove(weight - u @ v, triangle, share.nonzeros, pattern, self.blocksize)
            rest = weight - sparse.dense()
            u, v, energy = project(rest, metric, rank)
            error = float(energy[rank:].sum())
            if error < least * (1 - BETTER):
                best, least = LowRank(u, v, sparse=sparse), error
            told(least)
        assert best is not None
        return best


def check_turns(iterations: int) -> None:
    """Refuses a number of turns.

    Raises:
        ConfigError: None at all.
    """
    if iterations < 1:
        raise ConfigError(f"iterations must be at least 1, got {iterations}")


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best u (out, rank) and v (rank, in) of a matrix in plain squared error.

    Only the smaller Gram is decomposed: its leading eigenvectors span the same space as an SVD's
    singular vectors, and the projection on them is all that is needed.
    """
    if rank == 0:
        return matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0, matrix.shape[1])
    if matrix.shape[0] <= matrix.shape[1]:
        u = eigen_descending(matrix @ matrix.T)[0][:, :rank]
        return u, u.T @ matrix
    v = eigen_descending(matrix.T @ matrix)[0][:, :rank].T
    return matrix @ v.T, v


def unscaled(parts: LowRank, scale: Tensor) -> LowRank:
    """Parts of W D as parts of W.

    Args:
        parts: Factors and sparse entries of W D.
        scale: D's diagonal (in,), not negative.
    """
    back = reciprocal(scale)
    assert parts.sparse is not None
    mask = parts.sparse.mask
    sparse = Sparse(mask, parts.sparse.values * back.expand(mask.shape)[mask])
    return LowRank(parts.u, parts.v * back, sparse=sparse)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale (in,), and 0 for inputs that are always zero: they get nothing."""
    return torch.where(scale > 0, 1 / scale, 0.0)
