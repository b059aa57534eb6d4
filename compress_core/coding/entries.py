"""Sparse entries in codes, by GPTQ: what rounding one loses the others of its row make up for.

Groups are of entries that follow one another in storage, row by row, and have the scales of the
values as they are given: a sweep through the columns opens none at its place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_core.coding.gptq import Marks, Swept, marks_of, round_columns
from compress_core.coding.grid import grid_of
from compress_core.coding.settings import Coding
from compress_core.forms.codes import Coded
from compress_core.sparse import Sparse


@dataclass
class _Given:
    """Marks (in, out) of all columns; of :class:`compress_core.coding.gptq.Grids`, none to take."""

    marks: Marks
    group: int | None = None

    def take(self, column: int, now: Tensor) -> None:
        raise AssertionError("all are known")

    def at(self, column: int) -> Marks:
        return Marks(*(part[column] for part in self.marks))


def gptq_entries(sparse: Sparse, swept: Swept, coding: Coding, dtype: torch.dtype) -> Coded:
    """Entries in codes with little error ‖(S − Ŝ) H^½‖, S the matrix that they are.

    Args:
        sparse: Entries of a matrix (out, in), values float64; at least one.
        swept: Of the inputs' second moment, by the same coding.
        coding: Bits, group, search and order.
        dtype: Of the scales.

    Returns:
        Codes (1, nonzeros) in the order of storage.

    Raises:
        NumericsError: A value is not finite, or no scale of ``dtype`` can reach it.
    """
    mask, values = sparse.mask, sparse.values[None]
    weight = None
    if coding.searches(coding.bits):
        weight = swept.diagonal.expand(mask.shape)[mask]
    grid = grid_of(values, coding.bits, coding.group, dtype, weight)
    marks = [
        Sparse(mask, part[0].repeat_interleave(coding.group)[: len(values[0])]).dense()
        for part in marks_of(grid, coding.bits)
    ]
    scale, least, most = (part.T[swept.order].contiguous() for part in marks)
    scale.masked_fill_(scale == 0, 1.0)  # what has no scale is divided by one, and stays zero
    given = _Given(Marks(scale, least, most))
    steps = round_columns(sparse.dense().T[swept.order].contiguous(), swept.triangle, given)
    zeros = grid.zeros[0].repeat_interleave(coding.group)[: len(values[0])]
    codes = (steps[swept.order.argsort()].T[mask] + zeros).to(torch.uint8)
    return Coded(grid.scales, codes[None], grid.zeros)
