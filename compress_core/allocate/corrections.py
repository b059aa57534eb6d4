"""A whole weight in codes for every layer, and an equal share of the rest for what corrects it.

It is part of the methods that correct a rounded weight, and no word of ``--allocate``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from compress_core.allocate.base import Evidence, Probe, budget_of, upwards
from compress_core.errors import BudgetError, ConfigError
from compress_core.forms.names import FULL, WIDTHS
from compress_core.types import LayerRef, Share, affordable


@dataclass(frozen=True)
class Corrections:
    """Whole weights take their codes first; of what is left every layer has the same share.

    It is a share of the layer's dense numbers, floored to whole components.

    Attributes:
        bits: Of every number of the whole weight.
        correction: Of every number of the components, ``FULL`` for numbers that are in no codes.
    """

    bits: int = 2
    correction: int = 4
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        known = ", ".join(map(str, WIDTHS))
        if self.bits not in WIDTHS:
            raise ConfigError(f"a base is in codes of {known} bits, got {self.bits}")
        if self.correction not in (FULL, *WIDTHS):
            raise ConfigError(
                f"the factors that correct a base are in codes of {known} bits or in {FULL}, got "
                f"{self.correction}"
            )

    def probe(self, kept: float) -> Probe | None:
        """It reads no table."""
        return None

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Refuses a budget that cannot hold the codes of all whole weights.

        Raises:
            BudgetError: It cannot; names the smallest budget that can.
        """
        if self._left(layers, kept) >= 0:
            return
        needed = self._base(layers) / sum(layer.dense_cost for layer in layers)
        raise BudgetError(
            f"kept={kept:g} does not hold every number in {self.bits} bits, which take "
            f"{upwards(needed):.4f} of 16 bits each: ask for more, for fewer "
            "bits or for larger groups of codes"
        )

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """Each layer's share; the budget passed :meth:`check`."""
        rest = self._left(layers, kept) / sum(layer.dense_cost for layer in layers)
        return {
            layer.name: self._share(layer, affordable(rest, layer.dense_cost)) for layer in layers
        }

    def _share(self, layer: LayerRef, numbers: int) -> Share:
        # What takes as much room as the dense weight is no part of the format.
        numbers = min(numbers, layer.dense_cost - 1 - self._base([layer]))
        rank = replace(layer, bits=self.correction).affordable_rank(numbers)
        # Of full rank the pivot form has no row beside its pivots, and nothing to hold in codes.
        rank = min(rank, min(layer.out_features, layer.in_features) - 1)
        return Share(rank, bits=self.bits, correction=self.correction)

    def _left(self, layers: Sequence[LayerRef], kept: float) -> int:
        """Numbers that the bases leave of the budget, below zero where it does not hold them."""
        return budget_of(layers, kept) - self._base(layers)

    def _base(self, layers: Sequence[LayerRef]) -> int:
        return sum(replace(layer, bits=self.bits).dense_cost for layer in layers)
