"""OATS (arXiv 2409.13652): sparse plus low rank by alternating thresholding of the scaled weight.

With D the root mean square of each input: L is the best rank-r fit of W D − S, then S the largest
entries of W D − L in each row, 80 times, and both are scaled back. From the paper: scale, order,
number of turns, the factors' quarter of the budget (the paper takes 0.3 for some models), rows, N:M
at the kept that it and the factors give, and block by block on compressed inputs. Ours: the SVD is
an eigendecomposition of the smaller Gram, which gives the same fit; entries that do not divide by
the rows go where they take most error away, so that the budget is met exactly and each turn is
still the best for what the other has; an input that is always zero gets nothing, where the
published scale would divide by zero.
"""

from compress_core.allocate.entries import Entries
from compress_core.method import Method
from compress_core.prune.alternate import Oats


def oats(low_rank: float = 0.25, iterations: int = 80, pattern: str = "unstructured") -> Method:
    """Alternating thresholding in the scale of the inputs.

    Args:
        low_rank: Part of a layer's numbers that the factors get, in [0, 1).
        iterations: Times that both parts are fitted.
        pattern: Of the sparse part: "unstructured", or N:M for N of every M neighbours.

    Raises:
        ConfigError: A value is out of its range.
    """
    return Method(
        "oats",
        "sparse plus low rank by turns, in the scale of the inputs",
        "2409.13652",
        allocate=Entries(low_rank=low_rank, pattern=pattern),
        decompose=None,
        fit=Oats(iterations, pattern),
    )
