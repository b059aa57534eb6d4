"""One price list of all that a layer can store: components, and bits for every number.

A point of a layer's curve is a rank or the dense weight, in a width of codes or in 16 bits. It
costs what is stored and is predicted to leave the KL of the cut (as ``fisher`` predicts it) and
that of the rounding (as ``compress_core.coding.expected`` does), added. The steepest step on all
layers' lower hulls is bought first, whatever it is made of. Both predictions are of second order,
layer by layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from compress_core.allocate.base import Curvature, Evidence, budget_of, least_rank
from compress_core.allocate.buying import Point, buy
from compress_core.allocate.fisher import Fisher
from compress_core.coding.expected import steps_squared
from compress_core.errors import BudgetError
from compress_core.forms.names import FULL, WIDTHS
from compress_core.types import LayerRef, Share

RANKS = 96  # that are looked at in each width, at least: of more only every so many


@dataclass(frozen=True)
class Prices:
    """Components and bits at one slope.

    Attributes:
        windows: Calibration windows for the gradients; 0 for all.
        labels: "sampled" from the model, for the Fisher information itself, or the "text"'s own.
        damp: Part of G's mean diagonal that is added to its diagonal.
        codes: Whether it chooses bits, too; else numbers are stored in as many as all layers have.
    """

    windows: int = 16
    labels: str = "sampled"
    damp: float = 0.03
    codes: bool = True
    reads: ClassVar[frozenset[str]] = frozenset({"predicted", "codes"})

    def __post_init__(self) -> None:
        Fisher(self.windows, self.labels, self.damp)  # it checks

    def probe(self, kept: float) -> Curvature | None:
        """Every layer's curve, whatever the budget."""
        return Curvature(self.windows, self.labels, self.damp, True)

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Refuses a budget that cannot hold the cheapest point of every layer.

        Raises:
            BudgetError: It cannot.
        """
        least = sum(min(self._shares(x), key=lambda s: s.cost(x)).cost(x) for x in layers)
        if least > budget_of(layers, kept):
            needed = least / sum(layer.dense_cost for layer in layers)
            raise BudgetError(
                f"kept={kept:g} cannot hold one component of each of {len(layers)} layers; this "
                f"model needs kept of at least {min(1.0, needed + 5e-5):.4f}"
            )

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """Buys the steepest segments of all hulls that still fit."""
        curves = {
            x.name: self._curve(x, evidence.predicted[x.name], evidence.codes[x.name])
            for x in layers
        }
        return buy(layers, budget_of(layers, kept), curves)

    def _curve(self, layer: LayerRef, cut: Tensor, codes: Tensor) -> list[Point]:
        cuts, (whole, *products) = cut.tolist(), codes.tolist()
        points = []
        for share in self._shares(layer):
            steps = steps_squared(share.bits or layer.bits)
            if share.rank is None:
                left = whole / steps
            else:
                left = cuts[share.rank] + products[share.rank] / steps
            points.append((share.cost(layer), left, share))
        return sorted(points, key=lambda point: point[:2])

    def _shares(self, layer: LayerRef) -> list[Share]:
        found = [Share(None)]
        for bits in (FULL, *WIDTHS) if self.codes else (FULL,):
            at = None if bits == FULL else bits
            priced = layer if at is None else replace(layer, bits=bits)
            if at is not None:
                found.append(Share(None, bits=at))
            if least_rank(priced) is not None:
                most = priced.paying_rank
                step = max(1, most // RANKS)
                found += [Share(rank, bits=at) for rank in range(1, most + 1, step)]
        return found
