"""Rounding to nearest: the whole weight in few bits, each number to its own nearest code.

No paper and no calibration text: what every quantiser is compared with. ``kept`` as of ``gptq``.
"""

from compress_core.allocate.widths import Widths
from compress_core.coding.settings import Coding
from compress_core.forms.names import GROUP
from compress_core.method import Method


def rtn(bits: int = 0, code_group: int = GROUP) -> Method:
    """Rounding to nearest.

    Args:
        bits: Of every code: 8, 6, 5, 4, 3 or 2; 0 for the widest that the budget holds.
        code_group: Codes that share a scale.

    Raises:
        ConfigError: A value is out of its range.
    """
    return Method(
        "rtn",
        "the whole weight in few bits, to the nearest code",
        "",
        allocate=Widths(bits),
        decompose=None,
        coding=Coding(0, code_group, rounding="nearest"),
    )
