"""Scale and zero of every group of a matrix, and the code that is nearest to each number.

A group's 2^b codes reach from its smallest to its largest number, zero counted in. The scale is
rounded up to the dtype in which it is stored before any code is taken, so that both ends stay in
reach and a code is off by half a scale at most. A group of one number throughout has that number
as its scale, and so loses nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compress_core.errors import NumericsError
from compress_core.finite import all_finite
from compress_core.forms.codes import Coded, groups_of

CLIPS = 20  # ranges that a search tries
LEAST_CLIP = 0.5  # of the whole range
_WHOLE_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as a float, in bytes


class Grid(NamedTuple):
    """Scale and zero of every group.

    Attributes:
        scales: (rows, groups), above zero, in the dtype in which they are stored.
        zeros: (rows, groups), uint8.
    """

    scales: Tensor
    zeros: Tensor


def grid_of(
    matrix: Tensor, bits: int, group: int, dtype: torch.dtype, weight: Tensor | None = None
) -> Grid:
    """The grid of every group of neighbours in a row.

    Args:
        matrix: float64 (rows, length); a row's last group may be shorter.
        bits: Of a code.
        group: Numbers that share a scale.
        dtype: Of the scales.
        weight: What an error in each column weighs, (length,). If given, the ends of a group are
            drawn in towards zero by the factor of ``CLIPS`` in [``LEAST_CLIP``, 1] that leaves
            the least Σ weight (w − ŵ)².

    Raises:
        NumericsError: A number is not finite, or beyond what a scale of ``dtype`` can reach.
    """
    groups = _grouped(matrix, group)
    low, high = groups.aminmax(dim=2)
    scales, zeros = _spanning(low, high, 1.0, bits, dtype)
    if not all_finite(scales):
        raise NumericsError(
            f"a matrix {tuple(matrix.shape)} has a number that is not finite or beyond {dtype}: "
            "it cannot be rounded to codes; look for what made it, or store it in a wider dtype"
        )
    if weight is not None:
        weights = _grouped(weight[None], group, 0.0)
        least = _error(groups, scales, zeros, bits, weights)
        for clip in torch.linspace(1.0, LEAST_CLIP, CLIPS).tolist()[1:]:
            drawn = _spanning(low, high, clip, bits, dtype)
            error = _error(groups, *drawn, bits, weights)
            better = error < least
            least = torch.where(better, error, least)
            scales = torch.where(better, drawn[0], scales)
            zeros = torch.where(better, drawn[1], zeros)
    return Grid(scales, zeros.to(torch.uint8))


def nearest(
    matrix: Tensor, bits: int, group: int, dtype: torch.dtype, weight: Tensor | None = None
) -> Coded:
    """Every number of a matrix to its nearest code; arguments and errors as of :func:`grid_of`."""
    grid = grid_of(matrix, bits, group, dtype, weight)
    scales, zeros = spread(grid, matrix.shape[1], group)
    return Coded(grid.scales, codes_at(matrix, scales, zeros, bits).to(torch.uint8), grid.zeros)


def spread(grid: Grid, length: int, group: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of every number, float64 (rows, length)."""
    scales, zeros = (
        part.to(torch.float64).repeat_interleave(group, dim=1)[:, :length] for part in grid
    )
    return scales, zeros


def codes_at(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest codes of values, as whole float64 numbers; all of one shape."""
    return (values / scales).round_().add_(zeros).clamp_(0, 2**bits - 1)


def decoded(coded: Coded, group: int) -> Tensor:
    """What codes stand for, float64 (rows, length), whatever the dtype of the scales."""
    return coded._replace(scales=coded.scales.to(torch.float64)).decoded(group)


def _grouped(matrix: Tensor, group: int, filled: float | None = None) -> Tensor:
    """(rows, groups, group); a short group is filled up, with its last number if not said else."""
    rows, length = matrix.shape
    groups = groups_of(length, group)
    missing = groups * group - length
    last = matrix[:, -1:] if filled is None else matrix.new_full((rows, 1), filled)
    whole = torch.cat([matrix, last.expand(-1, missing)], dim=1) if missing else matrix
    return whole.reshape(rows, groups, group)


def _spanning(
    low: Tensor, high: Tensor, clip: float, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale in ``dtype`` and zero, whole but float64, of groups with these ends."""
    top = 2**bits - 1
    below, above = low.clamp_max(0.0), high.clamp_min(0.0)
    scales = torch.where(
        low == high, low.abs().to(dtype), _rounded_up((above - below) * clip / top, dtype)
    )
    scales = torch.where(scales == 0, 1.0, scales)  # of nothing but zeros
    zeros = (below * -clip / scales.to(below.dtype)).round_().clamp_(0, top)
    return scales, zeros


def _error(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int, weights: Tensor) -> Tensor:
    """Σ weight (w − ŵ)² of every group."""
    wide, zeros = scales.to(groups.dtype)[..., None], zeros[..., None]
    codes = codes_at(groups, wide, zeros, bits)
    return ((groups - (codes - zeros) * wide).square_() * weights).sum(dim=2)


def _rounded_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The least numbers of ``dtype`` that are not below these, which are not negative."""
    rounded = values.to(dtype)
    # The bits of a positive float, read as a whole number, count up through the floats.
    after = (rounded.view(_WHOLE_NUMBERS[dtype.itemsize]) + 1).view(dtype)
    return torch.where(rounded.to(values.dtype) < values, after, rounded)
