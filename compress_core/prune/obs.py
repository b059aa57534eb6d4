"""Optimal brain surgeon, column by column (SparseGPT, arXiv 2301.00774).

With H the second moment of the inputs and F the columns from j on, removing w_j costs
w_j² / [H_F⁻¹]_jj and is made up for best by w_F −= w_j / [H_F⁻¹]_jj · H_F⁻¹[:, j]. All H_F⁻¹ are
read from one factor: with H⁻¹ = Uᵀ U and U upper triangular, [H_F⁻¹]_jj = U_jj² and the column is
U_jj U_jF.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError, NumericsError
from compress_core.fit import PREFIX, Moments, Start, start_share
from compress_core.prune.select import (
    UNSTRUCTURED,
    Pattern,
    best_of_all,
    best_of_groups,
    read_pattern,
)
from compress_core.prune.wanda import second_moment, without_factors
from compress_core.sparse import Sparse

Select = Callable[[Tensor, int], Tensor]  # (scores of some columns, the first's index) -> mask


@dataclass(frozen=True)
class SparseGPT:
    """Removes entries column by column; those to the right make up for them.

    Attributes:
        damping: Part of the mean of H's diagonal that is added to it.
        blocksize: Columns whose mask is chosen at once and behind which updates are collected.
        pattern: "unstructured", or N:M.
    """

    damping: float = 0.01
    blocksize: int = 128
    pattern: str = UNSTRUCTURED
    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def __post_init__(self) -> None:
        check_surgery(self.damping, self.blocksize)
        read_pattern(self.pattern)

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """``share.nonzeros`` entries, their values changed to make up for the others."""
        share = start_share(start)
        gram = second_moment(moments)
        factor = inverse_factor(damped(gram, self.damping), self.damping)
        pattern, read = read_pattern(self.pattern), weight * (gram.diagonal() > 0)
        return without_factors(remove(read, factor, share.nonzeros, pattern, self.blocksize))


def check_surgery(damping: float, blocksize: int) -> None:
    """Refuses settings of the sweep.

    Raises:
        ConfigError: Damping is negative, or a block has no column.
    """
    if not 0 <= damping < float("inf"):
        raise ConfigError(f"damping, a part of the mean of H, is 0 or more; got {damping:g}")
    if blocksize < 1:
        raise ConfigError(f"blocksize must be at least 1, got {blocksize}")


def damped(gram: Tensor, damping: float, own: float = 0.0) -> Tensor:
    """H (in, in) with something on its diagonal, and 1 for inputs that are always zero.

    Args:
        gram: E[x xᵀ], float64 (in, in).
        damping: Part of the mean of the diagonal, over the inputs that are alive.
        own: Part of the diagonal entry itself.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    added = torch.where(dead, 1.0, own * diagonal + damping * mean)
    return gram + torch.diag(added)


def inverse_factor(h: Tensor, damping: float) -> Tensor:
    """U (in, in), upper triangular, with H⁻¹ = Uᵀ U.

    H = R Rᵀ with R upper triangular is a Cholesky factorisation from the last row up, and U = R⁻¹.

    Raises:
        NumericsError: H is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if int(failed) or not bool(torch.isfinite(lower).all()):
        raise NumericsError(
            f"the second moment {tuple(h.shape)} of the inputs is not positive definite at "
            f"damping={damping:g}: give more calibration text or more damping"
        )
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def remove(
    weight: Tensor, factor: Tensor, count: int, pattern: Pattern | None, blocksize: int
) -> Sparse:
    """The sweep, keeping ``count`` entries, or by ``pattern`` where there is one.

    The published code takes the same share of each block of columns, by a threshold that removes
    one entry too many; here blocks share out ``count`` exactly. Where M does not divide the
    blocks, they are narrowed until it does.

    Args:
        weight: float64 (out, in).
        factor: Of :func:`inverse_factor`.
        count: Entries that stay.
        pattern: N:M, whose masks are chosen when the sweep arrives at them.
        blocksize: Columns in a block.
    """
    columns = weight.shape[1]
    if pattern is not None:
        width = pattern.of
        blocksize = max(width, blocksize // width * width)

        def select(scores: Tensor, first: int) -> Tensor:
            return best_of_groups(scores, pattern)
    else:
        width = blocksize

        def select(scores: Tensor, first: int) -> Tensor:
            behind = first + scores.shape[1]
            return best_of_all(scores, count * behind // columns - count * first // columns)

    return sweep(weight, factor, select, width, blocksize)


def sweep(weight: Tensor, factor: Tensor, select: Select, width: int, blocksize: int) -> Sparse:
    """Goes through the columns; every ``width`` of them ``select`` says which entries stay.

    Args:
        weight: float64 (out, in).
        factor: U (in, in) of :func:`inverse_factor`.
        select: Chooses by w_j² / [H_F⁻¹]_jj, given as (out, width).
        width: Columns chosen at once; divides ``blocksize``.
        blocksize: Columns after which the rest of the weight is brought up to date.
    """
    columns = weight.shape[1]
    # Columns in rows, so that each is contiguous.
    w = weight.T.clone(memory_format=torch.contiguous_format)
    kept = torch.zeros_like(w, dtype=torch.bool)
    diagonal = factor.diagonal()
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        errors = torch.zeros_like(w[start:stop])
        for j in range(start, stop):
            if (j - start) % width == 0:
                group = slice(j, min(j + width, stop))
                scores = (w[group] / diagonal[group, None]).square()
                kept[group] = select(scores.T, j).T
            error = w[j].masked_fill(kept[j], 0.0) / diagonal[j]
            errors[j - start] = error
            w[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1.0)
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return Sparse.of(w.T, kept.T.contiguous())
