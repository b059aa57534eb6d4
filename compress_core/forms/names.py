"""Names of the forms in which a product of low rank is stored; what they are is in `products`."""

from typing import Literal, get_args

FactorForm = Literal["plain", "pivot", "auto"]
FACTORS: tuple[str, ...] = get_args(FactorForm)
"""The forms that users choose from; auto is the smaller of both."""
FORM = "factors"  # the option that chooses
PLAIN, EIGHT_BITS = "plain", "eight bits"

WIDTHS = (8, 6, 5, 4, 3, 2)  # bits of a code
FULL = 16  # bits of a number that is not in codes, as they are counted
GROUP = 32  # codes that share a scale, unless asked otherwise
BITS, GROUP_OF = "bits", "group"  # options that choose them
