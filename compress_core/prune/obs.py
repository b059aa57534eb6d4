"""Optimal brain surgeon, column by column (SparseGPT, arXiv 2301.00774).

With H the second moment of the inputs and F the columns from j on, removing w_j costs
w_j² / [H_F⁻¹]_jj and is made up for best by w_F −= w_j / [H_F⁻¹]_jj · H_F⁻¹[:, j]. All of it is
read from one factor of H: see ``sweep``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError, NumericsError
from compress_core.finite import all_finite
from compress_core.fit import PREFIX, Moments, Start, start_share
from compress_core.prune.select import (
    UNSTRUCTURED,
    Pattern,
    best_of_all,
    best_of_groups,
    read_pattern,
)
from compress_core.prune.sweep import sweep
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
        triangle = upper_factor(damped(gram, self.damping), self.damping)
        pattern, read = read_pattern(self.pattern), weight * (gram.diagonal() > 0)
        return without_factors(remove(read, triangle, share.nonzeros, pattern, self.blocksize))


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


def upper_factor(h: Tensor, damping: float) -> Tensor:
    """R (in, in), upper triangular, with H = R Rᵀ: a Cholesky factorisation from the last row up.

    Raises:
        NumericsError: H is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if int(failed) or not all_finite(lower):
        raise NumericsError(
            f"the second moment {tuple(h.shape)} of the inputs is not positive definite at "
            f"damping={damping:g}: give more calibration text or more damping"
        )
    return lower.flip(0, 1)


def remove(
    weight: Tensor, triangle: Tensor, count: int, pattern: Pattern | None, blocksize: int
) -> Sparse:
    """The sweep, keeping ``count`` entries, or by ``pattern`` where there is one.

    The published code takes the same share of each block of columns, by a threshold that removes
    one entry too many; here blocks share out ``count`` exactly. Where M does not divide the
    blocks, they are narrowed until it does.

    Args:
        weight: float64 (out, in).
        triangle: Of :func:`upper_factor`.
        count: Entries that stay.
        pattern: N:M, whose masks are chosen when the sweep arrives at them.
        blocksize: Columns in a block.
    """
    select, width = _best_of_blocks(count, weight.shape[1]), blocksize
    if pattern is not None:
        select, width = lambda scores, first: best_of_groups(scores, pattern), pattern.of
    found = prune(weight, triangle, [select], width, blocksize)
    return Sparse.of(weight - found.errors[:, 0].T, found.kept[:, 0].T.contiguous())


def remove_to_each(
    weight: Tensor, triangle: Tensor, counts: Sequence[int], blocksize: int
) -> "Pruned":
    """What :func:`remove` leaves with each of some counts, all in one sweep."""
    selects = [_best_of_blocks(count, weight.shape[1]) for count in counts]
    return prune(weight, triangle, selects, blocksize, blocksize)


@dataclass(frozen=True)
class Pruned:
    """What is left of a weight by each of some choices, all (in, choices, out), columns in rows.

    Attributes:
        errors: W − W′, float64.
        wanted: What they would best have been, each for those before it; see ``sweep``.
        kept: Which entries stay: their errors are the wanted ones.
    """

    errors: Tensor
    wanted: Tensor
    kept: Tensor


def prune(
    weight: Tensor, triangle: Tensor, selects: Sequence[Select], width: int, blocksize: int
) -> Pruned:
    """Goes through the columns; every ``width`` of them it is chosen which entries stay.

    Args:
        weight: W, float64 (out, in).
        triangle: R (in, in) of :func:`upper_factor`.
        selects: Choose by w_j² / [H_F⁻¹]_jj, given as (out, width); each makes a W′ of its own.
        width: Columns chosen at once.
        blocksize: Columns after which the rest of the weight is brought up to date.
    """
    columns, diagonal = weight.T.contiguous()[:, None], triangle.diagonal()
    wanted = weight.new_zeros(weight.shape[1], len(selects), len(weight))
    kept = torch.zeros_like(wanted, dtype=torch.bool)

    def arrive(j: int, errors: Tensor) -> None:
        group = slice(j, j + width)
        now = columns[group] - errors
        scores = (now * diagonal[group, None, None]).square_()
        for one, select in enumerate(selects):
            kept[group, one] = select(scores[:, one].T, j).T

    def err(j: int, error: Tensor) -> None:
        # What stays errs as those before it want it to, and what goes by all that it was.
        torch.where(kept[j], wanted[j], columns[j], out=error)

    sweep(triangle, wanted, err, blocksize, width, arrive)
    return Pruned(torch.where(kept, wanted, columns), wanted, kept)


def _best_of_blocks(count: int, columns: int) -> Select:
    """The best of every block of columns, ``count`` in all."""

    def select(scores: Tensor, first: int) -> Tensor:
        behind = first + scores.shape[1]
        return best_of_all(scores, count * behind // columns - count * first // columns)

    return select
