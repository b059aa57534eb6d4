"""Wanda (arXiv 2306.11695): keeps, in each row, the entries with the largest |W_ij| ‖x_j‖.

From the paper: the score, the comparison within a row, N:M, and block by block on the inputs behind
what is compressed already. Ours: where the budget does not divide by the rows, the rest goes to the
rows that have most to gain, so that it is met exactly; the published code drops the same whole
number in each row. The index of an entry is in the bytes and not in the count, as in the paper.
"""

from compress_core.allocate.entries import Entries
from compress_core.method import Method
from compress_core.prune.wanda import Wanda


def wanda(pattern: str = "unstructured") -> Method:
    """Removes entries by size times norm of the input.

    Args:
        pattern: "unstructured", or N:M for N of every M neighbours, such as 2:4 or 4:8.

    Raises:
        ConfigError: The pattern is none.
    """
    return Method(
        "wanda",
        "entries that are large on large inputs, row by row",
        "2306.11695",
        allocate=Entries(pattern=pattern),
        decompose=None,
        fit=Wanda(pattern),
    )
