"""AdaSVD's adaCR (arXiv 2502.01403): blocks that change their input least keep most.

I = cosine of a block's input and output, I_n = I / mean(I), and the block's linears keep
mrr + I_n · (trr − mrr), with trr the target (our ``kept``) and mrr the least any block keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from compress_core.allocate.base import Evidence, Probe, check_one_component_each
from compress_core.allocate.spend import spend
from compress_core.errors import ConfigError, NumericsError
from compress_core.types import LayerRef, Share

BELOW_TARGET = 0.1  # the paper gives no mrr; this far below the target where none is asked for


@dataclass(frozen=True)
class Importance:
    """More for blocks that change their input least (AdaSVD's adaCR).

    The budget is met exactly, which the paper leaves open.
    The paper's cosine is undefined for a linear whose input and output differ in width, so it is
    taken over the hidden states of the block (mean over tokens) and serves all its linears. Shares
    are clipped to [mrr, 1]; where that, or layers of unequal size, would miss the target, the
    part above mrr is scaled until the target is met.

    Attributes:
        mrr: Least share that a block keeps, at most the target; None is 0.1 below the target.
    """

    mrr: float | None = None
    reads: ClassVar[frozenset[str]] = frozenset({"similarity"})

    def __post_init__(self) -> None:
        if self.mrr is not None and not 0 < self.mrr < 1:
            raise ConfigError(f"mrr, the least share a block keeps, is in (0, 1); got {self.mrr:g}")

    def probe(self, kept: float) -> Probe | None:
        """It reads no table."""
        return None

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Refuses a least share above the target.

        Raises:
            ConfigError: mrr is above ``kept``.
            BudgetError: The budget does not hold one component of every layer.
        """
        if self.mrr is not None and self.mrr > kept:
            raise ConfigError(
                f"mrr={self.mrr:g} is above kept={kept:g}: no block may keep less than mrr, so the "
                "budget could not be met; give a smaller mrr"
            )
        check_one_component_each(layers, kept)

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """One share per block, turned into whole ranks.

        Raises:
            NumericsError: The similarities have no positive mean, so there is nothing to divide by.
        """
        similarity = evidence.similarity
        mean = sum(similarity.values()) / len(similarity)
        if not mean > 0:
            raise NumericsError(
                f"the blocks' mean cosine of input and output is {mean:g}; adaCR divides by it and "
                "needs it positive: choose another --allocate"
            )
        least = self.mrr if self.mrr is not None else max(kept - BELOW_TARGET, kept / 2)

        def wanted(scale: float) -> dict[str, float]:
            above = {b: scale * value / mean * (kept - least) for b, value in similarity.items()}
            return {x.name: min(1.0, max(least, least + above[x.block])) for x in layers}

        return spend(layers, kept, wanted)
