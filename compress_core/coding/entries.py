"""Sparse entries in codes, by GPTQ: what rounding one loses the others of its row make up for.

Groups are of entries that follow one another in storage, row by row, and have the scales of the
values as they are given: a sweep through the columns opens none at its place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_core.coding.gptq import Swept, sweep
from compress_core.coding.grid import grid_of, spread
from compress_core.coding.settings import Coding
from compress_core.forms.codes import Coded
from compress_core.sparse import Sparse


@dataclass
class _Given:
    """Grids that are all known beforehand; of :class:`compress_core.coding.gptq.Grids`."""

    coding: Coding
    scale: Tensor
    zero: Tensor

    def whole_groups(self, columns: int) -> int:
        return columns

    def arrive(self, w: Tensor, column: int) -> None:
        pass


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
    scale, zero = (
        Sparse(mask, part[0]).dense().T[swept.order]
        for part in spread(grid, values.shape[1], coding.group)
    )
    places = mask.T[swept.order]
    scale = torch.where(places, scale, 1.0)  # what has no scale is divided by one all the same
    w = sparse.dense().T[swept.order].contiguous()
    found = sweep(w, swept.factor, _Given(coding, scale, zero), places)
    codes = found[swept.order.argsort()].T[mask]
    return Coded(grid.scales, codes[None], grid.zeros)
