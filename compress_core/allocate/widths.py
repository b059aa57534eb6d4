"""How many bits every layer gets: the same for all, or more where codes are predicted to cost more.

It is part of the methods that round the whole weight, and no word of ``--allocate``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from compress_core.allocate.base import Curvature, Evidence, budget_of
from compress_core.allocate.buying import Point, buy
from compress_core.allocate.fisher import Fisher
from compress_core.allocate.predict import left_by
from compress_core.errors import BudgetError, ConfigError
from compress_core.forms.names import FULL, WIDTHS
from compress_core.types import LayerRef, Share


@dataclass(frozen=True)
class Widths:
    """Every layer keeps its whole weight, in codes.

    Attributes:
        bits: Of every code; 0 for the widest that the budget holds.
        mixed: Whether layers get widths of their own: the steepest fall of predicted KL per bit
            first, on the hull of every layer's widths.
        gradients: Says what is predicted, and of which windows.
    """

    bits: int = 0
    mixed: bool = False
    gradients: Fisher = field(default_factory=Fisher)

    def __post_init__(self) -> None:
        if self.bits not in (0, *WIDTHS):
            raise ConfigError(f"codes have {', '.join(map(str, WIDTHS))} bits, got {self.bits}")
        if self.mixed and self.bits:
            raise ConfigError(f"bits={self.bits} is one width for all: leave it out, or mixed=true")

    @property
    def reads(self) -> frozenset[str]:
        """A prediction where widths differ."""
        return frozenset({"codes"} if self.mixed else ())

    def probe(self, kept: float) -> Curvature | None:
        """What it predicts from."""
        found = self.gradients
        return Curvature(found.windows, found.labels, found.damp, True) if self.mixed else None

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Refuses a budget that cannot hold the codes that take least.

        Raises:
            BudgetError: It cannot.
        """
        # With a scale for every few numbers codes take more than 16 bits.
        least = min(self._widths, key=lambda bits: self._cost(layers, bits))
        if self._cost(layers, least) > budget_of(layers, kept):
            needed = self._cost(layers, least) / sum(layer.dense_cost for layer in layers) + 5e-5
            raise BudgetError(
                f"kept={kept:g} does not hold every number in {least} bits, which take "
                f"{needed:.4f} of 16 bits each: ask for more, or cut before you round"
            )

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """The dense weight of every layer, in so many bits."""
        if self.mixed:
            curves = {x.name: _curve(x, left_by(x, evidence)) for x in layers}
            return buy(layers, budget_of(layers, kept), curves)
        budget = budget_of(layers, kept)
        bits = next(bits for bits in self._widths if self._cost(layers, bits) <= budget)
        return {layer.name: Share(None, bits=bits) for layer in layers}

    @property
    def _widths(self) -> tuple[int, ...]:
        """Those that there are, widest first."""
        return (self.bits,) if self.bits else (FULL, *WIDTHS)

    def _cost(self, layers: Sequence[LayerRef], bits: int) -> int:
        return sum(Share(None, bits=bits).cost(layer) for layer in layers)


def _curve(layer: LayerRef, left: Callable[[Share], float]) -> list[Point]:
    shares = [Share(None, bits=bits) for bits in (FULL, *WIDTHS)]
    points = [(share.cost(layer), left(share), share) for share in shares]
    return sorted(points, key=lambda point: point[:2])
