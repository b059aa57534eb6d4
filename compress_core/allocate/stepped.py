"""Ranks that a device likes: another allocator's shares, at the ranks that are allowed.

Kernels multiply fast where a side is a multiple of 8 or 64, and factors near the dense weight's
cost take longer than the dense weight does: two small products in place of one large one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from compress_core.allocate.base import (
    Allocator,
    Curvature,
    Evidence,
    Probe,
    as_said,
    budget_of,
    least_kept,
)
from compress_core.errors import BudgetError, ConfigError
from compress_core.types import LayerRef, Share

Shape = tuple[int, int]  # out, in


@dataclass(frozen=True)
class Stepped:
    """Another allocator's shares in allowed ranks, within the same budget.

    A layer's allowed ranks are the multiples at which factors pay, and on a device also only
    those at which they are faster there; the dense weight is always allowed. Every share is
    floored to an allowed one. What that leaves buys whole steps, for the layers that lack most
    of what the other allocator gave them; a step is a multiple, or from the largest allowed rank
    the dense weight. Where layers for which no rank is allowed have to stay dense, all others pay
    alike: their shares are scaled until the budget is met.

    Attributes:
        inner: Divides the budget first.
        multiple: What every rank is a multiple of.
        device: What the ranks are to be fast on; "" for none, or where ``ceilings`` say it.
        ceilings: Out, in, and the largest rank at which factors are faster than the dense weight
            of that shape; 0 where none is. Empty where speed is not asked for.
    """

    inner: Allocator
    multiple: int = 1
    device: str = ""
    ceilings: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ConfigError(f"ranks are multiples of 1 or more, got {self.multiple}")

    @property
    def reads(self) -> frozenset[str]:
        """What the other one reads."""
        return self.inner.reads

    def on(self, ceilings: Mapping[Shape, int]) -> "Stepped":
        """The same with what was measured on its device."""
        found = tuple(sorted((*shape, rank) for shape, rank in ceilings.items()))
        return replace(self, device="", ceilings=found)

    def probe(self, kept: float) -> Probe | Curvature | None:
        """The other one's table."""
        return self.inner.probe(kept)

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Refuses a budget that does not hold the cheapest allowed share of every layer.

        Raises:
            BudgetError: It does not; or as the other one's.
            ConfigError: As the other one's.
        """
        self.inner.check(layers, kept)
        if kept < 1:
            self._scaled(layers, kept, {layer.name: 0.0 for layer in layers})

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """The other one's shares, floored to allowed ones; then what is left, by whole steps.

        Raises:
            BudgetError: The budget does not hold the cheapest allowed share of every layer.
        """
        given = self.inner.allocate(layers, kept, evidence)
        if kept >= 1:
            return given
        wanted = {layer.name: float(given[layer.name].cost(layer)) for layer in layers}
        shares, scale = self._scaled(layers, kept, wanted)
        left = budget_of(layers, kept) - _cost(layers, shares)

        def lack(layer: LayerRef) -> float:
            ideal = scale * wanted[layer.name]
            return (ideal - shares[layer.name].cost(layer)) / layer.atom_cost

        while True:
            steps = {layer.name: self._next(layer, shares[layer.name]) for layer in layers}
            costs = {x.name: steps[x.name].cost(x) - shares[x.name].cost(x) for x in layers}
            fits = [x for x in layers if 0 < costs[x.name] <= left]
            if not fits:
                return shares
            first = min(fits, key=lambda x: (-lack(x), x.name))
            shares[first.name] = steps[first.name]
            left -= costs[first.name]

    def largest(self, layer: LayerRef) -> int:
        """The largest rank allowed below the dense weight; 0 where none is."""
        most = layer.paying_rank
        if self.ceilings:
            members = layer.name.count(" + ") + 1  # of a stack, which are multiplied one by one
            shape = (layer.out_features // members, layer.in_features)
            most = min(most, {(out, into): rank for out, into, rank in self.ceilings}[shape])
        return most // self.multiple * self.multiple

    def _scaled(
        self, layers: Sequence[LayerRef], kept: float, wanted: Mapping[str, float]
    ) -> tuple[dict[str, Share], float]:
        """Allowed shares within the budget, and the scale in [0, 1] of what was wanted."""
        budget = budget_of(layers, kept)
        tops = {layer.name: self.largest(layer) for layer in layers}

        def at(scale: float) -> dict[str, Share]:
            return {x.name: self._floor(x, scale * wanted[x.name], tops[x.name]) for x in layers}

        least = _cost(layers, at(0.0))
        if least > budget:
            self._refuse(layers, kept, least)
        scale = _largest(lambda scale: _cost(layers, at(scale)) <= budget)
        return at(scale), scale

    def _floor(self, layer: LayerRef, wanted: float, top: int) -> Share:
        if not top or wanted >= layer.dense_cost:
            return Share(None)
        rank = math.floor(layer.ideal_rank(wanted) + 1e-9) // self.multiple * self.multiple
        return Share(min(max(rank, self.multiple), top))

    def _next(self, layer: LayerRef, share: Share) -> Share:
        if share.rank is None:
            return share
        rank = share.rank + self.multiple
        return Share(rank if rank <= self.largest(layer) else None)

    def _refuse(self, layers: Sequence[LayerRef], kept: float, least: int) -> None:
        dense = [layer for layer in layers if not self.largest(layer)]
        what = f"ranks that are multiples of {self.multiple}" if self.multiple > 1 else "ranks"
        what += " and faster than the dense weight on the device" if self.ceilings else ""
        kept_dense = f", with {len(dense)} of {len(layers)} layers dense that have none"
        ways = [f"--kept {least_kept(least, layers):g}"]
        ways += ["a smaller --rank-multiple"] if self.multiple > 1 else []
        ways += ["no device="] if self.ceilings else []
        raise BudgetError(
            f"kept={as_said(kept, layers):g} does not hold {what}{kept_dense if dense else ''}: "
            f"give {' or '.join(ways)}"
        )


def _cost(layers: Sequence[LayerRef], shares: Mapping[str, Share]) -> int:
    return sum(shares[layer.name].cost(layer) for layer in layers)


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest scale in [0, 1] at which something holds that holds at 0 and ever less."""
    if holds(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
