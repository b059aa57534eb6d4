"""HASSLE-free (arXiv 2502.00899): sparse plus low rank by turns, both in the metric of the outputs.

min ‖(W − S − u v) X‖²: SparseGPT on W − u v, then the factors on W − S, 80 times, and the best turn
is taken. From the paper and its code: the order, the number of turns, 0.3 of the budget for the
factors, damping of 0.5 % of each diagonal entry and of their mean, the same in both steps.
Deviations: the factors are the optimum in closed form (the outputs projected, see ``decompose``),
where the paper takes 50 steps of Adam on the rescaled problem, so the rescaling has no part; only
SparseGPT prunes, not ALPS; with N:M the factors get their share of the numbers, not rank 64; where
the budget is exact and H is factored see ``sparsegpt``.
"""

from compress_core.allocate.entries import Entries
from compress_core.method import Method
from compress_core.prune.alternate import HassleFree


def hassle_free(
    low_rank: float = 0.3,
    iterations: int = 80,
    pattern: str = "unstructured",
    damping: float = 0.005,
    own_damping: float = 0.005,
    blocksize: int = 128,
) -> Method:
    """SparseGPT and truncation by turns.

    Args:
        low_rank: Part of a layer's numbers that the factors get, in [0, 1).
        iterations: Times that both parts are fitted.
        pattern: Of the sparse part: "unstructured", or N:M for N of every M neighbours.
        damping: Part of the mean of H's diagonal that is added to it.
        own_damping: Part of each diagonal entry that is added to itself.
        blocksize: Columns whose mask is chosen at once.

    Raises:
        ConfigError: A value is out of its range.
    """
    return Method(
        "hassle_free",
        "SparseGPT and truncation by turns, least output error",
        "2502.00899",
        allocate=Entries(low_rank=low_rank, pattern=pattern),
        decompose=None,
        fit=HassleFree(iterations, damping, own_damping, blocksize, pattern),
    )
