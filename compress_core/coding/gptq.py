"""GPTQ (arXiv 2210.17323): numbers are rounded column by column, the later ones making up.

With H the second moment of the inputs and F the columns from j on, an error e in column j is made
up for best by w_F −= e / [H_F⁻¹]_jj · H_F⁻¹[:, j] (see ``prune.obs``), and then costs
e² / [H_F⁻¹]_jj. Scale and zero of a group are those of its numbers as they are when the sweep
arrives at them.

From the paper: the sweep in blocks, 1 % damping, and as an option its code's order of columns. An
input that is always zero takes its nearest code and spreads no error.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compress_core.coding.grid import Grid, grid_of
from compress_core.coding.settings import Coding
from compress_core.errors import NumericsError
from compress_core.finite import all_finite
from compress_core.fit import Moments
from compress_core.forms.codes import Coded
from compress_core.prune.obs import damped, upper_factor
from compress_core.prune.sweep import sweep
from compress_core.prune.wanda import second_moment

BLOCK = 128  # columns behind which updates are collected


@dataclass(frozen=True)
class Swept:
    """A second moment as sweeps read it.

    Attributes:
        diagonal: Of H, (in,).
        order: In which columns are rounded, (in,).
        triangle: R (in, in) of :func:`upper_factor`, columns in that order.
    """

    diagonal: Tensor
    order: Tensor
    triangle: Tensor

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
        return cls(h.diagonal(), order, upper_factor(ready, coding.damping))


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
    if not all_finite(matrix):
        raise NumericsError(f"a matrix {tuple(matrix.shape)} to be rounded is not finite")
    kind = _AlongInputs if along == 1 else _AlongOutputs
    grids, back = kind(matrix, swept, coding, dtype), swept.order.argsort()
    steps = round_columns(matrix.T[swept.order].contiguous(), swept.triangle, grids)[back]
    grid, lines = grids.stored(back), steps.T if along == 1 else steps
    zeros = grid.zeros.repeat_interleave(coding.group, dim=1)[:, : lines.shape[1]]
    return Coded(grid.scales, (lines + zeros).to(torch.uint8).contiguous(), grid.zeros)


class Marks(NamedTuple):
    """What the numbers of a column can become: whole multiples of a scale, in some range.

    Attributes:
        scale: (out,), above zero.
        least: The least multiple, (out,); with ``most`` zero where nothing is stored.
        most: The largest.
    """

    scale: Tensor
    least: Tensor
    most: Tensor


class Grids(Protocol):
    """What a sweep asks of the grids of its numbers.

    Attributes:
        group: Columns whose grids are taken together; None where all are known beforehand.
    """

    group: int | None

    def take(self, column: int, now: Tensor) -> None:
        """Takes those of some columns from the first on, as they are now, (group, out)."""
        ...

    def at(self, column: int) -> Marks:
        """Those of a column of the sweep."""
        ...


def round_columns(w: Tensor, triangle: Tensor, grids: Grids) -> Tensor:
    """The sweep: of every number the multiple of its scale that stands for it, float64 (in, out).

    Args:
        w: The matrix, float64 (in, out), columns in rows in the order of the sweep.
        triangle: As of :class:`Swept`.
        grids: Of the matrix.
    """
    wanted, steps = torch.zeros_like(w), torch.empty_like(w)

    def arrive(column: int, errors: Tensor) -> None:
        grids.take(column, w[column : column + len(errors)] - errors)

    def err(j: int, error: Tensor) -> None:
        scale, least, most = grids.at(j)
        torch.sub(w[j], wanted[j], out=steps[j]).div_(scale).round_().clamp_(least, most)
        torch.addcmul(w[j], steps[j], scale, value=-1, out=error)

    if grids.group is None:
        sweep(triangle, wanted, err, BLOCK)
    else:
        sweep(triangle, wanted, err, BLOCK, grids.group, arrive)
    return steps


class _AlongInputs:
    """Of groups along inputs: taken as the sweep goes, or before it where its order is another."""

    def __init__(self, matrix: Tensor, swept: Swept, coding: Coding, dtype: torch.dtype) -> None:
        self.coding, self.dtype, self.order = coding, dtype, swept.order.tolist()
        self.weight = swept.diagonal if coding.searches(coding.bits) else None
        self.group: int | None = None if coding.order else coding.group
        self.taken, self.marks = list[Grid](), list[Marks]()
        if coding.order:
            self.take(0, matrix.T)

    def take(self, column: int, now: Tensor) -> None:
        coding = self.coding
        weight = None if self.weight is None else self.weight[column : column + len(now)]
        grid = grid_of(now.T, coding.bits, coding.group, self.dtype, weight)
        self.taken.append(grid)
        self.marks += map(Marks, *(part.T.contiguous() for part in marks_of(grid, coding.bits)))

    def at(self, column: int) -> Marks:
        return self.marks[self.order[column] // self.coding.group]

    def stored(self, back: Tensor) -> Grid:
        """All of them, (out, groups)."""
        return Grid(*(torch.cat(parts, dim=1) for parts in zip(*self.taken, strict=True)))


class _AlongOutputs:
    """Of groups along outputs: each column has its own, taken when the sweep comes to it."""

    def __init__(self, matrix: Tensor, swept: Swept, coding: Coding, dtype: torch.dtype) -> None:
        self.coding, self.dtype, self.out = coding, dtype, len(matrix)
        self.group: int | None = 1
        alike = matrix.new_ones(len(matrix))  # in one column all weigh the same
        self.weight = alike if coding.searches(coding.bits) else None
        self.taken = list[Grid]()

    def take(self, column: int, now: Tensor) -> None:
        coding = self.coding
        self.taken.append(grid_of(now, coding.bits, coding.group, self.dtype, self.weight))

    def at(self, column: int) -> Marks:
        marks = marks_of(self.taken[column], self.coding.bits)
        return Marks(*(part[0].repeat_interleave(self.coding.group)[: self.out] for part in marks))

    def stored(self, back: Tensor) -> Grid:
        """All of them in the order of storage, (in, groups)."""
        return Grid(*(torch.cat(parts)[back] for parts in zip(*self.taken, strict=True)))


def marks_of(grid: Grid, bits: int) -> Marks:
    """The marks of every group, float64, of the shape of its scales."""
    scales, zeros = grid.scales.to(torch.float64), grid.zeros.to(torch.float64)
    return Marks(scales, -zeros, 2**bits - 1 - zeros)
