"""GPTQ (arXiv 2210.17323): numbers are rounded column by column, the later ones making up.

With H the second moment of the inputs and F the columns from j on, an error e in column j is made
up for best by w_F −= e / [H_F⁻¹]_jj · H_F⁻¹[:, j] (see ``prune.obs``), and then costs
e² / [H_F⁻¹]_jj. Scale and zero of a group are those of its numbers as they are when the sweep
arrives at them.

From the paper: the sweep in blocks, 1 % damping, and as an option its code's order of columns. An
input that is always zero takes its nearest code and spreads no error.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress_core.coding.grid import Grid, codes_at, grid_of, spread
from compress_core.coding.settings import Coding
from compress_core.errors import NumericsError
from compress_core.fit import Moments
from compress_core.forms.codes import Coded, groups_of
from compress_core.prune.obs import damped, inverse_factor
from compress_core.prune.wanda import second_moment

BLOCK = 128  # columns behind which updates are collected


@dataclass(frozen=True)
class Swept:
    """A second moment as sweeps read it.

    Attributes:
        diagonal: Of H, (in,).
        order: In which columns are rounded, (in,).
        factor: U (in, in) of :func:`inverse_factor`, columns in that order.
    """

    diagonal: Tensor
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, moment: Tensor, coding: Coding) -> "Swept":
        """That of H = E[x xᵀ], float64 (in, in).

        Raises:
            NumericsError: It is not finite, or no second moment.
        """
        h = second_moment(Moments(prefix=moment))
        order = torch.arange(len(h), device=h.device)
        if coding.order:
            order = h.diagonal().argsort(descending=True, stable=True)
        ready = damped(h, coding.damping)[order][:, order]
        return cls(h.diagonal(), order, inverse_factor(ready, coding.damping))


def gptq(
    matrix: Tensor, swept: Swept, coding: Coding, dtype: torch.dtype, *, along: int = 1
) -> Coded:
    """A matrix (out, in) in codes, with little error ‖(W − Ŵ) H^½‖.

    Args:
        matrix: float64 (out, in).
        swept: Of the inputs' second moment, by the same coding.
        coding: Bits, group, search and order.
        dtype: Of the scales.
        along: Where groups run: 1 for neighbouring inputs, 0 for neighbouring outputs.

    Returns:
        The codes of the matrix, or, with groups along outputs, of its transpose.

    Raises:
        NumericsError: A number is not finite, or becomes so large that no scale can reach it.
    """
    if not bool(matrix.isfinite().all()):
        raise NumericsError(f"a matrix {tuple(matrix.shape)} to be rounded is not finite")
    w = matrix.T.clone(memory_format=torch.contiguous_format)
    grids = _Grids(w, swept.diagonal, coding, dtype, along)
    if coding.order and along == 1:
        grids.take_all(w)
    order, back = swept.order, swept.order.argsort()
    codes = sweep(w[order], swept.factor, grids.ordered(order))[back]
    if along == 0:
        return Coded(grids.scales[back], codes, grids.zeros[back])
    return Coded(grids.scales, codes.T.contiguous(), grids.zeros)


def sweep(w: Tensor, factor: Tensor, grids: "Grids", places: Tensor | None = None) -> Tensor:
    """Codes of a matrix with columns in rows, (in, out), which is changed; as whole uint8.

    Args:
        w: The matrix, float64.
        factor: As of :class:`Swept`.
        grids: Of it, in the order of the sweep.
        places: Where it has numbers, bool (in, out); elsewhere it stays zero, and what the columns
            before would add there goes on to those behind. None for everywhere.
    """
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    diagonal, columns, block = factor.diagonal(), len(w), grids.whole_groups(BLOCK)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            grids.arrive(w, j)
            scale, zero = grids.scale[j], grids.zero[j]
            found = codes_at(w[j], scale, zero, grids.coding.bits)
            codes[j] = found.to(torch.uint8)
            stands_for = (found - zero) * scale
            if places is not None:
                stands_for.masked_fill_(~places[j], 0.0)
            error = (w[j] - stands_for) / diagonal[j]
            errors[j - start] = error
            w[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1.0)
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return codes


class Grids(Protocol):
    """What a sweep asks of the grids of its numbers.

    Attributes:
        coding: By which they were taken.
        scale: Of every number, float64, (in, out) in the order of the sweep.
        zero: Beside it.
    """

    coding: Coding
    scale: Tensor
    zero: Tensor

    def whole_groups(self, columns: int) -> int:
        """About so many columns that no group lies on both sides of their end."""
        ...

    def arrive(self, w: Tensor, column: int) -> None:
        """Takes the grid of what a column opens, from (in, out) as it is now."""
        ...


class _Grids:
    """Scales and zeros, taken as a sweep goes.

    Attributes:
        scales: As they will be stored, (out, groups); with groups along outputs (in, groups), in
            the order of the sweep.
        zeros: Beside them.
        scale: Of every number, float64, (in, out) in the order of the sweep.
        zero: Beside it.
    """

    def __init__(
        self, w: Tensor, weight: Tensor, coding: Coding, dtype: torch.dtype, along: int
    ) -> None:
        self.coding, self.along, self.complete = coding, along, False
        columns, rows = w.shape
        shape = (rows, groups_of(columns, coding.group))
        if along == 0:
            shape = (columns, groups_of(rows, coding.group))
            weight = weight.new_ones(rows)  # in one column all weigh the same
        self.weight = weight if coding.searches(coding.bits) else None
        self.scales = torch.empty(shape, dtype=dtype, device=w.device)
        self.zeros = torch.empty(shape, dtype=torch.uint8, device=w.device)
        self.scale, self.zero = torch.empty_like(w), torch.empty_like(w)

    def whole_groups(self, columns: int) -> int:
        """About so many columns that no group lies on both sides of their end."""
        group = self.coding.group if self.along == 1 else 1
        return max(group, columns // group * group)

    def arrive(self, w: Tensor, column: int) -> None:
        """Takes the grid of what a column opens, from (in, out) as it is now."""
        if self.along == 0:
            grid = self._of(w[column][None], self.weight)
            self.scales[column], self.zeros[column] = grid.scales[0], grid.zeros[0]
            scale, zero = spread(grid, w.shape[1], self.coding.group)
            self.scale[column], self.zero[column] = scale[0], zero[0]
        elif not self.complete and column % self.coding.group == 0:
            place = slice(column, column + self.coding.group)
            grid = self._of(w[place].T, None if self.weight is None else self.weight[place])
            group = column // self.coding.group
            self.scales[:, group], self.zeros[:, group] = grid.scales[:, 0], grid.zeros[:, 0]
            scale, zero = spread(grid, len(w[place]), self.coding.group)
            self.scale[place], self.zero[place] = scale.T, zero.T

    def take_all(self, w: Tensor) -> None:
        """Takes those of all groups along inputs, before the sweep, in the order of storage."""
        for column in range(len(w)):
            self.arrive(w, column)
        self.complete = True

    def ordered(self, order: Tensor) -> "_Grids":
        """With what is known of every number in the order of the sweep."""
        self.scale, self.zero = self.scale[order], self.zero[order]
        return self

    def _of(self, lines: Tensor, weight: Tensor | None) -> Grid:
        return grid_of(lines, self.coding.bits, self.coding.group, self.scales.dtype, weight)
