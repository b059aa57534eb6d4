"""Duo-SVD's module-level allocation (arXiv 2510.19385): a multiple-choice knapsack over KL.

With every module at the target share R by plain truncation, each is set in turn to each candidate
share and the model's KL is measured; the candidates with the least sum of changes in KL that fit
the budget are chosen, 1.0 standing for the dense weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from compress_core.allocate.base import (
    Evidence,
    Probe,
    as_said,
    budget_of,
    check_one_component_each,
    least_kept,
    share_at,
)
from compress_core.allocate.hull import check_windows
from compress_core.allocate.spend import top_up
from compress_core.errors import BudgetError, ConfigError
from compress_core.types import LayerRef, Share

CANDIDATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Knapsack:
    """The least sum of measured KL over candidate shares that fits (Duo-SVD).

    Where the published code leaves something open or gets it wrong: costs are exact or rounded up
    to a unit and choices are read back from stored pointers, so the budget is never overspent; the
    published code floors costs and picks the state closest to the budget, which can overshoot by
    two per cent. What is left over (less than the step between two candidates) then buys single
    components, most divergence per number first.

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
        """Refuses a budget that cannot hold the smallest candidate of every layer.

        Raises:
            BudgetError: It cannot.
        """
        check_one_component_each(layers, kept)
        least = sum(_least_cost(layer, self._shares(kept)) for layer in layers)
        if least > budget_of(layers, kept):
            raise BudgetError(
                f"kept={as_said(kept, layers):g} does not hold the smallest candidate of every "
                f"layer, which take {least_kept(least, layers):.4f}: ask for more, or choose "
                "another --allocate"
            )

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """The best choice of candidates, then single components."""
        tables = {
            x.name: _choices(x, self._shares(kept), evidence.divergence[x.name])
            for x in sorted(layers, key=lambda x: x.name)  # so that ties do not hang on the order
        }
        budget = budget_of(layers, kept)
        unit = max(1, sum(layer.dense_cost for layer in layers) // self.resolution)
        shares = dict(zip(tables, _solve(list(tables.values()), budget, unit), strict=True))
        slopes = {name: _slope(table) for name, table in tables.items()}
        return top_up(layers, budget, shares, lambda x, share: slopes[x.name])

    def _shares(self, kept: float) -> tuple[float, ...]:
        return tuple(sorted({*self.candidates, kept}))


Choice = tuple[int, Share, float]  # numbers stored, share, change in KL


def _choices(layer: LayerRef, shares: Sequence[float], divergence: Sequence[float]) -> list[Choice]:
    """What can be chosen for a layer, cheapest first, each share once."""
    found: dict[Share, Choice] = {}
    for wanted, change in zip(shares, divergence, strict=True):
        share = share_at(layer, wanted)
        found[share] = (share.cost(layer), share, change)
    return sorted(found.values(), key=lambda choice: choice[0])


def _least_cost(layer: LayerRef, shares: Sequence[float]) -> int:
    return min(share_at(layer, wanted).cost(layer) for wanted in shares)


def _solve(tables: Sequence[Sequence[Choice]], budget: int, unit: int) -> list[Share]:
    """The best choices: dynamic programming over units of what the cheapest choices leave.

    Only what a choice costs above the cheapest is rounded up, so the cheapest always fit.
    """
    units = (budget - sum(table[0][0] for table in tables)) // unit
    above = [[-(-(choice[0] - table[0][0]) // unit) for choice in table] for table in tables]
    best = np.full(units + 1, np.inf)
    best[0] = 0.0
    pointers = []
    for table, needed in zip(tables, above, strict=True):
        after = np.full(units + 1, np.inf)
        pointer = np.full(units + 1, -1, dtype=np.int16)
        for index, (taken, (_, _, change)) in enumerate(zip(needed, table, strict=True)):
            if taken > units:
                continue
            candidate = best[: units + 1 - taken] + change
            better = candidate < after[taken:]
            after[taken:][better] = candidate[better]
            pointer[taken:][better] = index
        best = after
        pointers.append(pointer)
    state = int(best.argmin())
    chosen = []
    for table, needed, pointer in zip(tables[::-1], above[::-1], pointers[::-1], strict=True):
        index = int(pointer[state])
        chosen.append(table[index][1])
        state -= needed[index]
    return chosen[::-1]


def _slope(table: Sequence[Choice]) -> float:
    """KL that a layer gains from its cheapest to its dearest choice, per number."""
    (low, _, worst), (high, _, best) = table[0], table[-1]
    return (worst - best) / max(1, high - low)
