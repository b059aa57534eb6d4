"""SVD-LLM v2's heterogeneous shares (arXiv 2503.12340): within a module type, by truncation loss.

For the layers of one type (all q_proj, ...), L = truncation loss at the uniform share and score =
1 / log L; of the type's removal N · (1 − kept), a layer bears the part score / Σ score. A larger
loss so means less removal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from compress_core.allocate.base import Evidence, Probe, check_one_component_each
from compress_core.allocate.spend import spend
from compress_core.types import LayerRef, Share, affordable


@dataclass(frozen=True)
class ByType:
    """More for layers of a larger truncation loss, within a module type (SVD-LLM v2).

    L is the Frobenius norm of the output error over all calibration tokens, as in the paper. Its
    log is guarded as log(e + L), because 1 / log L changes its sign at L = 1. Where clipping to 1
    would miss the budget, all removals are scaled alike. With ``metric=two_sided`` L² is twice the
    predicted KL, added up over these tokens, so that layers of a type are compared by what they
    cost.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"losses"})

    def probe(self, kept: float) -> Probe | None:
        """It reads no table."""
        return None

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Refuses a budget that cannot hold one component of every layer.

        Raises:
            BudgetError: It cannot.
        """
        check_one_component_each(layers, kept)

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """Scores within each type, turned into whole ranks."""
        scores: dict[str, dict[str, float]] = {}
        for layer in layers:
            numbers = affordable(kept, layer.dense_cost)
            rank = min(layer.affordable_rank(numbers), layer.paying_rank)
            squared = max(0.0, float(evidence.losses[layer.name][rank]))
            loss = math.sqrt(squared * max(1, evidence.tokens))
            scores.setdefault(type_of(layer), {})[layer.name] = 1 / math.log(math.e + loss)
        removal = {}
        for of_type in scores.values():
            total = math.fsum(of_type.values())  # the same in any order
            for name, score in of_type.items():
                removal[name] = len(of_type) * (1 - kept) * score / total

        def wanted(scale: float) -> dict[str, float]:
            factor = 1 / scale if scale > 0 else math.inf
            return {name: max(0.0, 1 - factor * share) for name, share in removal.items()}

        return spend(layers, kept, wanted)


def type_of(layer: LayerRef) -> str:
    """The layer's name without the number of its block."""
    return layer.name.partition(" + ")[0].replace(f".{layer.block}.", ".*.", 1)
