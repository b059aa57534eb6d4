"""Duo-SVD's module-level allocation (arXiv 2510.19385): a multiple-choice knapsack over KL.

With every module at the target share R by plain truncation, each is set in turn to each candidate
share and the model's KL is measured; the candidates with the least sum of changes in KL that fit
the budget are chosen, 1.0 standing for the dense weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from compress_core.allocate.base import Evidence, Probe, budget_of, check_one_component_each
from compress_core.allocate.hull import check_windows
from compress_core.allocate.spend import top_up
from compress_core.errors import BudgetError, ConfigError
from compress_core.types import LayerRef, Share, affordable, dense_or

CANDIDATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Knapsack:
    """The rule above, with what the published code leaves open or gets wrong.

    Costs are exact or rounded up to a unit and choices are read back from stored pointers, so the
    budget is never overspent; the published code floors costs and picks the state closest to the
    budget, which can overshoot by two per cent. What is left over (less than the step between two
    candidates) then buys single components, most divergence per number first.

    Attributes:
        candidates: Shares tried beside the target itself, each in (0, 1].
        probe_windows: Calibration windows for the table; 32 in the paper.
        resolution: Units into which the dense size is divided; smaller models are exact.
    """

    candidates: tuple[float, ...] = CANDIDATES
    probe_windows: int = 32
    resolution: int = 20000
    reads: ClassVar[frozenset[str]] = frozenset({"divergence"})

    def __post_init__(self) -> None:
        if not all(0 < share <= 1 for share in self.candidates) or self.resolution < 100:
            raise ConfigError(
                f"knapsack needs candidates in (0, 1] and a resolution of at least 100, got "
                f"{self.candidates} and {self.resolution}"
            )
        check_windows(self.probe_windows)

    def probe(self, kept: float) -> Probe | None:
        """All candidates and the target, with every other layer at the target."""
        return Probe(kept, self._shares(kept), self.probe_windows)

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Refuses a budget that cannot hold one component of every layer.

        Raises:
            BudgetError: It cannot.
        """
        check_one_component_each(layers, kept)

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """The best choice of candidates, then single components.

        Raises:
            BudgetError: Even the smallest candidates do not fit.
        """
        tables = [
            _choices(layer, self._shares(kept), evidence.divergence[layer.name]) for layer in layers
        ]
        budget = budget_of(layers, kept)
        unit = max(1, sum(layer.dense_cost for layer in layers) // self.resolution)
        chosen = _solve(layers, tables, budget, unit, kept)
        shares = {x.name: tables[i][chosen[i]][1] for i, x in enumerate(layers)}
        slopes = {x.name: _slope(tables[i]) for i, x in enumerate(layers)}
        return top_up(layers, budget, shares, lambda x, share: slopes[x.name] / x.atom_cost)

    def _shares(self, kept: float) -> tuple[float, ...]:
        return tuple(sorted({*self.candidates, kept}))


Choice = tuple[int, Share, float]  # numbers stored, share, change in KL


def _choices(
    layer: LayerRef, shares: Sequence[float], divergence: Sequence[float | None]
) -> list[Choice]:
    """What can be chosen for a layer, cheapest first, each share once."""
    found: dict[Share, Choice] = {}
    for wanted, change in zip(shares, divergence, strict=True):
        if change is None:  # not one component fits
            continue
        share = share_at(layer, wanted)
        found[share] = (share.cost(layer), share, change)
    return sorted(found.values(), key=lambda choice: choice[0])


def share_at(layer: LayerRef, wanted: float) -> Share:
    """The share of a layer at a candidate: floored rank, or dense where that would not pay."""
    if wanted >= 1:
        return Share(None)
    return dense_or(affordable(wanted, layer.dense_cost) // layer.atom_cost, layer)


def _solve(
    layers: Sequence[LayerRef],
    tables: Sequence[Sequence[Choice]],
    budget: int,
    unit: int,
    kept: float,
) -> list[int]:
    """Index of the choice per layer: dynamic programming over units of the budget."""
    units = budget // unit
    best = np.full(units + 1, np.inf)
    best[0] = 0.0
    pointers = []
    for table in tables:
        after = np.full(units + 1, np.inf)
        pointer = np.full(units + 1, -1, dtype=np.int16)
        for index, (cost, _, change) in enumerate(table):
            taken = -(-cost // unit)
            if taken > units:
                continue
            candidate = best[: units + 1 - taken] + change
            better = candidate < after[taken:]
            after[taken:][better] = candidate[better]
            pointer[taken:][better] = index
        best = after
        pointers.append(pointer)
    if not np.isfinite(best).any():
        least = sum(min(choice[0] for choice in table) for table in tables)
        total = sum(layer.dense_cost for layer in layers)
        raise BudgetError(
            f"kept={kept:g} does not hold the smallest candidate of every layer, which take "
            f"{least / total:.3f}: ask for more, or give smaller candidates"
        )
    state = int(best.argmin())
    chosen = []
    for table, pointer in zip(reversed(tables), reversed(pointers), strict=True):
        index = int(pointer[state])
        chosen.append(index)
        state -= -(-table[index][0] // unit)
    return chosen[::-1]


def _slope(table: Sequence[Choice]) -> float:
    """KL that a layer gains from its cheapest to its dearest choice, per number."""
    (low, _, worst), (high, _, best) = table[0], table[-1]
    return (worst - best) / max(1, high - low)
