"""One matrix of a layer, rounded as its slot asks."""

from typing import NamedTuple

import torch
from torch import Tensor

from compress_core.coding.gptq import Swept, gptq
from compress_core.coding.grid import decoded, nearest
from compress_core.coding.settings import FULL, Coding
from compress_core.errors import NumericsError
from compress_core.finite import all_finite
from compress_core.forms.codes import Coded


class Rounded(NamedTuple):
    """A matrix as it will be stored.

    Attributes:
        stored: Its codes, those of its transpose where groups run along outputs, or its numbers.
        value: What they stand for, float64, as the matrix was given.
    """

    stored: Coded | Tensor
    value: Tensor


def rounded(
    slot: str,
    matrix: Tensor,
    coding: Coding,
    dtype: torch.dtype,
    swept: Swept | None = None,
    *,
    along: int = 1,
) -> Rounded:
    """A matrix (out, in), rounded.

    Args:
        slot: Whose bits it gets.
        matrix: float64.
        coding: How.
        dtype: Of scales, or of the numbers where the slot is in no codes.
        swept: Of the inputs, by the same coding, for GPTQ; None for the nearest codes.
        along: Where groups run: 1 for neighbouring inputs, 0 for neighbouring outputs.

    Raises:
        ConfigError: Nothing says how many bits.
        NumericsError: A number is not finite, or beyond ``dtype``.
    """
    bits = coding.bits_of(slot)
    if bits == FULL:
        stored = matrix.to(dtype)
        if not all_finite(stored):
            raise NumericsError(
                f"{slot} {tuple(matrix.shape)} has a number that is not finite or beyond {dtype}: "
                "look for what made it, or store it in a wider dtype"
            )
        return Rounded(stored, stored.to(torch.float64))
    lines = matrix if along == 1 else matrix.T
    if swept is not None:
        codes = gptq(matrix, swept, coding.at(bits), dtype, along=along)
    else:
        alike = lines.new_ones(lines.shape[1]) if coding.searches(bits) else None
        codes = nearest(lines, bits, coding.group, dtype, alike)
    value = decoded(codes, coding.group)
    return Rounded(codes, value if along == 1 else value.T)
