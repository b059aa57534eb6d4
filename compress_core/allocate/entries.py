"""The same share of every layer, between entries and factors, as methods that prune divide it.

It is part of those methods, from their papers, and no word of ``--allocate``.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from compress_core.allocate.base import Evidence, Probe, as_said, budget_of, price_of, upwards
from compress_core.errors import BudgetError, ConfigError
from compress_core.forms.names import FULL
from compress_core.prune.select import UNSTRUCTURED, Pattern, read_pattern
from compress_core.types import LayerRef, Share, affordable

SLACK = 0.005  # of kept that a pattern may leave unspent: as finely as a search tells budgets apart


@dataclass(frozen=True)
class Entries:
    """Unstructured, every layer stores kept · out · in numbers exactly.

    Places of entries cost nothing beside them, as in the papers, but where numbers are in codes:
    there ``kept`` counts room, and places take some.

    With a pattern the sparse part has the pattern's numbers, whatever ``kept`` says, so only the
    one ``kept`` that it gives is taken.

    Attributes:
        low_rank: Part of a layer's numbers that factors get, in [0, 1), floored to whole ranks.
        adapter: Rank of the factors as a part of min(out, in), in place of ``low_rank``.
        pattern: Of the sparse part: "unstructured", or N:M.
    """

    low_rank: float = 0.0
    adapter: float | None = None
    pattern: str = UNSTRUCTURED
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.low_rank < 1:
            raise ConfigError(
                f"low_rank, the factors' part of a layer's numbers, is in [0, 1); "
                f"got {self.low_rank:g}"
            )
        if self.adapter is not None and not 0 <= self.adapter < 1:
            raise ConfigError(
                f"rank_share, a part of the smaller side, is in [0, 1); got {self.adapter:g}"
            )
        read_pattern(self.pattern)

    @property
    def gives_ranks(self) -> bool:
        """Whether layers get components beside their entries."""
        return bool(self.low_rank or self.adapter)

    def probe(self, kept: float) -> Probe | None:
        """It reads no table."""
        return None

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Shapes and budget decide everything here.

        Raises:
            BudgetError: A layer cannot hold a single entry beside its factors, or the pattern
                keeps another share.
            ConfigError: M does not divide a layer's inputs.
        """
        self.allocate(layers, kept, Evidence())

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """Each layer's share; arguments and errors as of :meth:`check`."""
        pattern = read_pattern(self.pattern)
        if pattern is not None:
            return self._by_pattern(layers, kept, pattern)
        if kept >= 1:
            return {layer.name: Share(None) for layer in layers}
        shares = {layer.name: self._unstructured(layer, kept) for layer in layers}
        for layer in layers:
            if shares[layer.name].nonzeros < 1:
                self._refuse(layer, kept, layers)
        return shares

    def _unstructured(self, layer: LayerRef, kept: float) -> Share:
        numbers = affordable(kept, layer.dense_cost)
        rank = self._rank(layer, numbers)
        if layer.bits == FULL:
            return Share(rank, numbers - layer.rank_cost(rank))
        counts = range(layer.out_features * layer.in_features + 1)
        return Share(rank, bisect_right(counts, numbers, key=lambda n: _price(layer, rank, n)) - 1)

    def _rank(self, layer: LayerRef, numbers: int) -> int:
        if self.adapter is not None:
            return affordable(self.adapter, min(layer.out_features, layer.in_features))
        return layer.affordable_rank(affordable(self.low_rank, numbers))

    def _by_pattern(
        self, layers: Sequence[LayerRef], kept: float, pattern: Pattern
    ) -> dict[str, Share]:
        shares = {}
        for layer in layers:
            if layer.in_features % pattern.of:
                raise ConfigError(
                    f"pattern={self.pattern} needs inputs that {pattern.of} divides; layer "
                    f"{layer.name} has {layer.in_features}"
                )
            nonzeros = layer.in_full.dense_cost * pattern.keep // pattern.of
            of_entries = layer.entries_cost(nonzeros)
            rank = self._rank(layer, math.floor(of_entries / (1 - self.low_rank)))
            shares[layer.name] = Share(rank, nonzeros)
        cost = sum(_price(x, shares[x.name].rank or 0, shares[x.name].nonzeros) for x in layers)
        whole = sum(layer.in_full.dense_cost for layer in layers)
        least, said = cost / whole, as_said(kept, layers)
        if not least - 1e-9 <= said <= least + SLACK or cost > budget_of(layers, kept):
            fits = upwards(least)
            beside = " with its factors" if any(share.rank for share in shares.values()) else ""
            if fits > 1:
                raise BudgetError(
                    f"pattern={self.pattern}{beside} stores more than the dense layers do "
                    f"({fits:g} of them): give a sparser pattern"
                )
            raise BudgetError(
                f"pattern={self.pattern}{beside} keeps {fits:g} of the layers, got kept={said:g}: "
                f"give --kept {fits:g}"
            )
        return shares

    def _refuse(self, layer: LayerRef, kept: float, layers: Sequence[LayerRef]) -> None:
        factors = self._unstructured(layer, kept).rank
        least = max(self._least(other) for other in layers)
        beside = f" beside factors of rank {factors}" if factors else ""
        raise BudgetError(
            f"kept={as_said(kept, layers):g} leaves layer {layer.name} ({layer.out_features}x"
            f"{layer.in_features}) without a single entry{beside}; this model needs kept of at "
            f"least {upwards(as_said(min(1.0, least), layers)):g}"
        )

    def _least(self, layer: LayerRef) -> float:
        rank = 0 if self.adapter is None else self._rank(layer, 0)
        return _price(layer, rank, 1) / layer.dense_cost


def _price(layer: LayerRef, rank: int, nonzeros: int) -> int:
    """What counts of a share: its numbers, and in codes all that takes room."""
    share = Share(rank, nonzeros)
    return share.cost(layer) if layer.bits == FULL else price_of(layer, share)
