"""SLiM (arXiv 2410.09615) without its quantiser: a pruned layer and an adapter for what is missing.

Wanda (or SparseGPT) prunes; the error, scaled by the inputs, is truncated to a tenth of the smaller
side. From the paper: mask, saliency-weighted truncation, rank. Deviations: no quantisation, of
weights or adapters, and no fine-tuning of the adapters; the paper prunes half and adds the adapter
on top, here both share the budget, so that methods compare at equal stored numbers; inputs are
weighed by their root mean square as in the published code, where the paper's text takes the mean
magnitude; an input that is always zero gets nothing, where the published code then drops all
weights. The entries that stay are W as in the text; the published code makes them W less the
adapter, which has less error in that scale but not always in the outputs (stories260K gains by it,
babyllama-1m loses).
"""

from compress_core.allocate.entries import Entries
from compress_core.method import Method
from compress_core.prune.adapter import Adapter
from compress_core.prune.obs import check_surgery


def slim(
    mask: str = "wanda",
    rank_share: float = 0.1,
    pattern: str = "unstructured",
    damping: float = 0.01,
    blocksize: int = 128,
) -> Method:
    """Pruning with a low-rank adapter.

    Args:
        mask: What prunes, "wanda" or "sparsegpt".
        rank_share: Rank of the adapter as a part of the layer's smaller side, in [0, 1).
        pattern: "unstructured", or N:M for N of every M neighbours, such as 2:4 or 4:8.
        damping: Of SparseGPT, where that prunes.
        blocksize: Of SparseGPT, where that prunes.

    Raises:
        ConfigError: A value is out of its range.
    """
    check_surgery(damping, blocksize)
    if mask != "sparsegpt":  # then nothing reads them
        damping, blocksize = Adapter.damping, Adapter.blocksize
    return Method(
        "slim",
        "pruned, with a low-rank adapter for the error",
        "2410.09615",
        allocate=Entries(adapter=rank_share, pattern=pattern),
        decompose=None,
        fit=Adapter(mask, damping, blocksize, pattern),
    )
