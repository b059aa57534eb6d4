"""The sweep through a layer's columns that SparseGPT and GPTQ have in common.

What is lost in a column those behind it make up for. With H = R Rᵀ, R upper triangular, the squared
error tr(E H Eᵀ) of E = W − W′ is ‖E R‖², and of its columns the j-th reads E_1 ... E_j alone: it is
zero where E_j is −Σ_{i<j} E_i R_ij / R_jj, the *wanted* error of column j, and anything beside that
costs its square times R_jj², which is 1 / [H_F⁻¹]_jj, F the columns from j on. So W_j less the
wanted error is what optimal brain surgery has brought the column to when it is come to (SparseGPT,
arXiv 2301.00774, and GPTQ, 2210.17323, there by H⁻¹ = Uᵀ U, U = R⁻¹). No inverse is taken.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Err = Callable[[int, Tensor], None]  # (column, where to write its error)
Arrive = Callable[[int, Tensor], None]  # (first column of a group, the errors wanted of all of it)


def sweep(
    triangle: Tensor,
    wanted: Tensor,
    err: Err,
    blocksize: int,
    group: int = 1,
    arrive: Arrive | None = None,
) -> None:
    """Goes through the columns, each of which is told what error those before it want of it.

    Halves of halves: the second half is brought up to date at once, by a product of matrices.

    Args:
        triangle: R (in, in) of :func:`compress_core.prune.obs.upper_factor`.
        wanted: Zeros, float64 (in, ...); its row is right when a column is come to.
        err: Writes what column j really errs by, W_j − W′_j, of the shape of a row of ``wanted``.
        blocksize: About so many columns, after which all behind them are brought up to date.
        group: Columns that are come to together.
        arrive: Is told, before the first of a group, the errors of all of it, (group, ...), that
            together would make up for those before.
    """
    columns = len(wanted)
    block = max(group, blocksize // group * group)
    errors = wanted.new_empty(min(block, columns), *wanted.shape[1:])
    flat, flat_errors = wanted.view(columns, -1), errors.view(len(errors), -1)
    told = -triangle / triangle.diagonal()

    def inside(first: int, stop: int, start: int) -> None:
        if stop - first == 1:
            if arrive is not None and first % group == 0:
                place = slice(first, first + group)
                arrive(first, _together(told[place, place], wanted[place]))
            err(first, errors[first - start])
            return
        middle = first + _half(stop - first, group)
        inside(first, middle, start)
        tell(first, middle, stop, start)
        inside(middle, stop, start)

    def tell(first: int, middle: int, stop: int, start: int) -> None:
        made = flat_errors[first - start : middle - start]
        flat[middle:stop].addmm_(told[first:middle, middle:stop].T, made)

    for start in range(0, columns, block):
        stop = min(start + block, columns)
        inside(start, stop, start)
        if stop < columns:
            tell(start, stop, columns, start)


def _half(columns: int, group: int) -> int:
    """About half of some columns, and no group on both sides."""
    if columns <= group:
        return columns // 2
    return max(group, columns // 2 // group * group)


def _together(told: Tensor, wanted: Tensor) -> Tensor:
    """What is wanted of some columns, each as if all before it erred as wanted, too."""
    flat = wanted.view(len(wanted), -1)
    found = torch.linalg.solve_triangular(-told.T, flat, upper=False, unitriangular=True)
    return found.view_as(wanted)
