"""The same share of every layer, as the papers do: floor(kept · out · in / (out + in)) ranks.

In another form than plain factors it is the largest rank that costs no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from compress_core.allocate.base import Evidence, Probe, as_said
from compress_core.errors import BudgetError
from compress_core.types import LayerRef, Share, affordable, dense_or


@dataclass(frozen=True)
class Uniform:
    """Every layer keeps the same share; a layer whose factors would not pay stays dense.

    Each layer is floored by itself, as in the papers, so what is left over of a layer's budget
    (less than one component) is not given to another.
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    def probe(self, kept: float) -> Probe | None:
        """It reads no table."""
        return None

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Shapes and budget decide everything here.

        Raises:
            BudgetError: A layer would be left with no component at all.
        """
        self.allocate(layers, kept, Evidence())

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """Floors each layer's rank.

        Raises:
            BudgetError: A layer would be left with no component at all.
        """
        if kept >= 1:
            return {layer.name: Share(None) for layer in layers}
        shares = {}
        for layer in layers:
            rank = layer.affordable_rank(affordable(kept, layer.dense_cost))
            if rank == 0:
                least = max(other.atom_cost / other.dense_cost for other in layers)
                raise BudgetError(
                    f"kept={as_said(kept, layers):g} leaves layer {layer.name} "
                    f"({layer.out_features}x{layer.in_features}) without a single component; this "
                    f"model needs kept of at least {as_said(min(1.0, least), layers) + 5e-5:.4f}"
                )
            shares[layer.name] = dense_or(rank, layer)
        return shares
