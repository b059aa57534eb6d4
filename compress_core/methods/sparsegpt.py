"""SparseGPT (arXiv 2301.00774): removes entries column by column, the rest making up for them.

From the paper: H = E[x xᵀ] with 1 % of its mean diagonal added, blocks of 128 columns, masks chosen
over a whole block (or N of every M columns) as the sweep arrives at it, and block by block of the
model on the inputs behind what is compressed already. Ours: the published code removes all up to a
threshold, one entry more than asked for in each block of columns, and we keep exactly as many as
the budget allows; the mean of the diagonal leaves out inputs that are always zero; H is factored
once, from its end, in place of an inverse between two factorisations; all of it in float64.
"""

from compress_core.allocate.entries import Entries
from compress_core.method import Method
from compress_core.prune.obs import SparseGPT


def sparsegpt(pattern: str = "unstructured", damping: float = 0.01, blocksize: int = 128) -> Method:
    """Optimal brain surgery, column by column.

    Args:
        pattern: "unstructured", or N:M for N of every M neighbours, such as 2:4 or 4:8.
        damping: Part of the mean of H's diagonal that is added to it.
        blocksize: Columns whose mask is chosen at once.

    Raises:
        ConfigError: A value is out of its range.
    """
    return Method(
        "sparsegpt",
        "entries removed one column at a time, the rest making up for them",
        "2301.00774",
        allocate=Entries(pattern=pattern),
        decompose=None,
        fit=SparseGPT(damping, blocksize, pattern),
    )
