"""Names of the forms in which a product of low rank is stored; what they are is in `products`."""

from typing import Literal, get_args

FactorForm = Literal["plain", "pivot", "auto"]
FACTORS: tuple[str, ...] = get_args(FactorForm)
"""The forms that users choose from; auto is the smaller of both."""
FORM = "factors"  # the option that chooses
PLAIN, AUTO, EIGHT_BITS = "plain", "auto", "eight bits"

WIDTHS = (8, 6, 5, 4, 3, 2)
"""Bits that a code may have."""
FULL = 16  # bits of a number that is not in codes
GROUP = 32  # neighbours that share a scale, unless asked otherwise
BITS, CODE_GROUP, ROUNDING = "bits", "code_group", "rounding"  # options of codes
