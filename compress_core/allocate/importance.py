"""AdaSVD's adaCR (arXiv 2502.01403): blocks that change their input most keep most.

I = 1 − cosine of a block's input and output, I_n = I / mean(I), and the block's linears keep
mrr + I_n · (trr − mrr), with trr the target (our ``kept``) and mrr the least any block keeps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from compress_core.allocate.base import Evidence, Probe, as_said, check_one_component_each
from compress_core.allocate.spend import spend
from compress_core.errors import ConfigError, NumericsError
from compress_core.options import one_of
from compress_core.types import LayerRef, Share

BELOW_TARGET = 0.05  # of mrr, as in the figure of the official repository: trr 0.60, mrr 0.55
LEAST_CHANGE = 1e-9  # a mean change below it is the rounding of cosines that are all 1

Measure = Literal["change", "cosine"]


@dataclass(frozen=True)
class Importance:
    """More for blocks that change their input most (AdaSVD's adaCR).

    The paper calls importance a similarity of input and output. The numbers of the official
    repository's overview figure (0.35 to 3.32 times their mean, most in the first and last blocks)
    are no cosines but have the shape of 1 − cosine, which is the default here.
    The cosine is undefined for a linear whose input and output differ in width, so it is
    taken over the hidden states of the block (mean over tokens) and serves all its linears.
    The budget is met exactly, which the paper leaves open: its shares are clipped to [mrr, 1], and
    where that, or layers of unequal size, would miss the target, the part above mrr is scaled
    until the target is met.

    Attributes:
        mrr: Least share that a block keeps, at most the target; None is 0.05 below the target, or
            half of a target below 0.1.
        importance: "change" (1 − cosine), or "cosine": blocks that change their input least keep
            most.
    """

    mrr: float | None = None
    importance: Measure = "change"
    reads: ClassVar[frozenset[str]] = frozenset({"similarity"})

    def __post_init__(self) -> None:
        if self.mrr is not None and not 0 < self.mrr < 1:
            raise ConfigError(f"mrr, the least share a block keeps, is in (0, 1); got {self.mrr:g}")
        one_of("allocator 'importance'", "importance", self.importance, ("change", "cosine"))

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
            said = as_said(kept, layers)
            of = "" if said == kept else f", {kept:g} of what layers take in their bits"
            raise ConfigError(
                f"mrr={self.mrr:g} is above kept={said:g}{of}: no block may keep less than mrr, so "
                "the budget could not be met; give a smaller mrr"
            )
        check_one_component_each(layers, kept)

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """One share per block, turned into whole ranks.

        Raises:
            NumericsError: The importances have no positive mean, so there is nothing to divide by.
        """
        importance = _importances(evidence.similarity, self.importance)
        least = self.mrr if self.mrr is not None else max(kept - BELOW_TARGET, kept / 2)

        def wanted(scale: float) -> dict[str, float]:
            shares = shares_of(importance, least, least + scale * (kept - least))
            return {x.name: min(1.0, max(least, shares[x.block])) for x in layers}

        return spend(layers, kept, wanted)


def shares_of(importance: Mapping[int, float], mrr: float, trr: float) -> dict[int, float]:
    """The paper's formula, neither clipped nor scaled: each block's share, trr in the mean.

    Args:
        importance: Block to its importance, of positive mean.
        mrr: Share of a block of no importance.
        trr: Share of a block of mean importance.
    """
    mean = sum(importance.values()) / len(importance)
    return {block: mrr + value / mean * (trr - mrr) for block, value in importance.items()}


def _importances(similarity: Mapping[int, float], measure: Measure) -> dict[int, float]:
    """Block to its importance.

    Raises:
        NumericsError: Their mean is not positive, or nothing but rounding.
    """
    count = len(similarity)
    if measure == "cosine":
        mean = sum(similarity.values()) / count
        if not mean > 0:
            raise NumericsError(
                f"the blocks' mean cosine of input and output is {mean:g}; importance=cosine "
                "divides by it and needs it positive: choose another --allocate"
            )
        return dict(similarity)
    change = {block: max(0.0, 1 - cosine) for block, cosine in similarity.items()}
    mean = sum(change.values()) / count
    if not mean >= LEAST_CHANGE:
        raise NumericsError(
            f"the blocks change their inputs by {mean:.2g} in the mean (1 - cosine), which is no "
            "more than rounding; adaCR divides by it: choose another --allocate"
        )
    return change
