"""What every pruner is: a layer's weight and a share in, a sparse part (and factors) out.

Unlike a decomposition, a pruner starts anew for every budget; what it reads is measured once.
"""

from typing import ClassVar, Protocol

from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.refine.base import Moments
from compress_core.types import Share


class Pruner(Protocol):
    """Makes one layer of its share."""

    reads: ClassVar[frozenset[str]]  # of DENSE, PREFIX (see ``refine.base``)

    def prune(self, weight: Tensor, share: Share, moments: Moments) -> LowRank:
        """What the layer keeps, exactly ``share.rank`` components and ``share.nonzeros`` entries.

        Args:
            weight: The dense weight, float64 (out, in).
            share: Never dense.
            moments: At least what it ``reads``.

        Raises:
            NumericsError: A moment from which nothing can be computed.
        """
        ...
