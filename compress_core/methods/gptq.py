"""GPTQ (arXiv 2210.17323): the whole weight in few bits, column by column, the rest making up.

From the paper: H = E[x xᵀ] with 1 % of its mean diagonal added, asymmetric codes, scale and zero of
a group taken when the sweep arrives at it, block by block on the inputs behind what is rounded
already. Ours: H is factored once, from its end, in place of an inverse between two factorisations,
all in float64; an input that is always zero takes its nearest code and spreads no error.

``kept`` is the share of 16-bit numbers that what is stored takes the room of, scales and zeros
among it, so that its rows compare with others' at equal bytes. With ``mixed=true`` layers get
widths of their own: the control at the same bytes that any correction of a rounded weight has to
beat.
"""

from compress_core.allocate.widths import Widths
from compress_core.coding.settings import Coding
from compress_core.coding.whole import KeepWhole
from compress_core.forms.names import GROUP
from compress_core.method import Method


def gptq(
    bits: int = 0,
    code_group: int = GROUP,
    mixed: bool = False,
    damping: float = 0.01,
    order: bool = False,
    search: int = 0,
) -> Method:
    """Rounding with second-order compensation.

    Args:
        bits: Of every code: 8, 6, 5, 4, 3 or 2; 0 for the widest that the budget holds.
        code_group: Codes that share a scale.
        mixed: Whether layers get widths of their own, by predicted KL.
        damping: Part of the mean of H's diagonal that is added to it.
        order: Whether columns are rounded by falling diagonal of H, as in the paper's code.
        search: Codes of so many bits at most have the ends of a group drawn in where that has
            less error.

    Raises:
        ConfigError: A value is out of its range.
    """
    return Method(
        "gptq",
        "the whole weight in few bits, one column at a time, the rest making up",
        "2210.17323",
        allocate=Widths(bits, mixed),
        decompose=None,
        fit=KeepWhole(),
        coding=Coding(0, code_group, damping=damping, search=search, order=order),
    )
