"""A pruned layer with a low-rank adapter for what pruning took away (SLiM, arXiv 2410.09615)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.fit import PREFIX, Moments, Start, start_share
from compress_core.options import one_of
from compress_core.prune.alternate import reciprocal, truncate
from compress_core.prune.obs import SparseGPT, check_surgery
from compress_core.prune.select import UNSTRUCTURED, read_pattern
from compress_core.prune.wanda import Wanda, input_scale
from compress_core.sparse import Sparse
from compress_core.types import Share

MASKS = ("wanda", "sparsegpt")


@dataclass(frozen=True)
class Adapter:
    """Prunes, then truncates the error in the scale of the inputs.

    Attributes:
        mask: What prunes: "wanda" or "sparsegpt".
        damping: Of SparseGPT.
        blocksize: Of SparseGPT.
        pattern: "unstructured", or N:M.
    """

    mask: str = "wanda"
    damping: float = 0.01
    blocksize: int = 128
    pattern: str = UNSTRUCTURED
    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def __post_init__(self) -> None:
        one_of("method 'slim'", "mask", self.mask, MASKS)
        check_surgery(self.damping, self.blocksize)
        read_pattern(self.pattern)

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """``share.nonzeros`` entries and an adapter of ``share.rank``."""
        share = start_share(start)
        scale = input_scale(moments)
        sparse = self._pruned(weight, share, moments)
        u, v = truncate((weight - sparse.dense()) * scale, share.rank or 0)
        return LowRank(u, v * reciprocal(scale), sparse=sparse)

    def _pruned(self, weight: Tensor, share: Share, moments: Moments) -> Sparse:
        entries = Share(0, share.nonzeros)
        if self.mask == "wanda":
            low = Wanda(self.pattern).fit(weight, entries, moments)
        else:
            surgery = SparseGPT(self.damping, self.blocksize, self.pattern)
            low = surgery.fit(weight, entries, moments)
        assert low.sparse is not None
        return low.sparse
