"""One price list of all that a layer can store: components, entries or columns, and their bits.

A point of a layer's curve is a rank, a number of entries or of columns, or the dense weight, in a
width of codes or in 16 bits. It costs what is stored, places of entries among it, and is predicted
to leave the KL of the cut (as ``fisher`` predicts it, of entries ``coding.expected_entries`` and of
columns ``coding.expected_columns``) and that of the rounding (as ``coding.expected`` does), added.
The steepest step on all layers' lower hulls is bought first, whatever it is made of. All
predictions are of second order, layer by layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from compress_core.allocate.base import (
    Curvature,
    Evidence,
    as_said,
    budget_of,
    least_kept,
    least_rank,
    price_of,
)
from compress_core.allocate.buying import Point, buy
from compress_core.allocate.fisher import Fisher
from compress_core.allocate.predict import left_by
from compress_core.coding.expected_entries import level_counts
from compress_core.errors import BudgetError
from compress_core.forms.names import FULL, WIDTHS
from compress_core.types import LayerRef, Share

RANKS = 96  # that are looked at in each width, at least: of more only every so many


@dataclass(frozen=True)
class Prices:
    """Components, entries, columns and bits at one slope.

    Attributes:
        windows: Calibration windows for the gradients; 0 for all.
        labels: "sampled" from the model, for the Fisher information itself, or the "text"'s own.
        damp: Part of G's mean diagonal that is added to its diagonal.
        codes: Whether it chooses bits, too; else numbers are stored in as many as all layers have.
        entries: Whether a layer may be of entries in place of components.
        columns: Whether a layer may be of some of its columns in place of components.
    """

    windows: int = 16
    labels: str = "sampled"
    damp: float = 0.03
    codes: bool = True
    entries: bool = False
    columns: bool = False

    def __post_init__(self) -> None:
        Fisher(self.windows, self.labels, self.damp)  # it checks

    def probe(self, kept: float) -> Curvature | None:
        """Every layer's curve, whatever the budget."""
        curves = {"codes": True, "entries": self.entries, "columns": self.columns}
        return Curvature(self.windows, self.labels, self.damp, **curves)

    @property
    def reads(self) -> frozenset[str]:
        """Predictions of all that it sells."""
        asked = {"entries": self.entries, "columns": self.columns}
        return frozenset({"predicted", "codes"} | {name for name in asked if asked[name]})

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Refuses a budget that cannot hold the cheapest point of every layer.

        Raises:
            BudgetError: It cannot.
        """
        least = sum(min(price_of(x, share) for share in self._shares(x)) for x in layers)
        if least > budget_of(layers, kept):
            raise BudgetError(
                f"kept={as_said(kept, layers):g} cannot hold one component of each of "
                f"{len(layers)} layers; this model needs kept of at least "
                f"{least_kept(least, layers):.4f}"
            )

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """Buys the steepest segments of all hulls that still fit."""
        curves = {x.name: self._curve(x, evidence) for x in layers}
        return buy(layers, budget_of(layers, kept), curves)

    def _curve(self, layer: LayerRef, evidence: Evidence) -> list[Point]:
        left = left_by(layer, evidence)
        points = [(price_of(layer, share), left(share), share) for share in self._shares(layer)]
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
            if self.entries:
                counts = level_counts(layer.out_features * layer.in_features)
                found += [Share(0, count, at) for count in counts]
            if self.columns:
                counts = level_counts(layer.in_features)
                shares = [Share(0, bits=at, columns=count) for count in counts]
                # A short column with its index may be no less than the dense weight.
                found += [x for x in shares if x.cost(layer) < layer.in_full.dense_cost]
        return found
