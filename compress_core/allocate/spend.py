"""From wanted shares to whole ranks: the budget met from below, to within one component."""

import math
from collections.abc import Callable, Mapping, Sequence

from compress_core.allocate.base import budget_of, least_rank
from compress_core.types import LayerRef, Share, dense_or

Scaled = Callable[[float], Mapping[str, float]]


def spend(layers: Sequence[LayerRef], kept: float, wanted: Scaled) -> dict[str, Share]:
    """Whole ranks for wanted shares.

    Args:
        layers: Every compressible layer.
        kept: In (0, 1], of the compressible parameters.
        wanted: Layer to the share it should keep, as a function of one scale. It must not fall as
            the scale grows; the scale is chosen so that all shares together are the budget.
    """
    if kept >= 1:
        return {layer.name: Share(None) for layer in layers}
    budget = budget_of(layers, kept)
    shares = wanted(_scale(layers, budget, wanted))
    ideal = {x.name: x.ideal_rank(shares[x.name] * x.dense_cost) for x in layers}
    ranks = {x.name: _floor(x, shares[x.name], ideal[x.name]) for x in layers}
    start = {x.name: Share(ranks[x.name]) for x in layers}
    while sum(start[x.name].cost(x) for x in layers) > budget:  # one component each was forced
        largest = max(
            (x for x in layers if (start[x.name].rank or 0) > 1 or _may_shrink(x, start[x.name])),
            key=lambda x: (start[x.name].cost(x) - shares[x.name] * x.dense_cost, x.name),
        )
        start[largest.name] = Share((start[largest.name].rank or largest.paying_rank + 1) - 1)
    return top_up(layers, budget, start, lambda x, share: ideal[x.name] - (share.rank or 0))


def top_up(
    layers: Sequence[LayerRef],
    budget: int,
    shares: Mapping[str, Share],
    need: Callable[[LayerRef, Share], float],
) -> dict[str, Share]:
    """Gives what is left of a budget to one layer after another, component by component.

    Args:
        layers: Every compressible layer.
        budget: Numbers that may be stored.
        shares: Where to start; within the budget.
        need: How much a layer at a share could do with one component more; the largest goes first.
    """
    found = dict(shares)
    left = budget - sum(found[x.name].cost(x) for x in layers)
    while True:
        fits = [x for x in layers if 0 < step_cost(x, found[x.name]) <= left]
        if not fits:
            return {x.name: found[x.name] for x in layers}
        for layer in sorted(fits, key=lambda x: (-need(x, found[x.name]), x.name)):
            cost = step_cost(layer, found[layer.name])
            if 0 < cost <= left:
                found[layer.name] = next_share(layer, found[layer.name])
                left -= cost


def next_share(layer: LayerRef, share: Share) -> Share:
    """One component more, or dense where that would not pay."""
    return share if share.rank is None else dense_or(share.rank + 1, layer)


def step_cost(layer: LayerRef, share: Share) -> int:
    """Numbers that the next step costs; 0 for a dense layer."""
    return next_share(layer, share).cost(layer) - share.cost(layer)


def _scale(layers: Sequence[LayerRef], budget: int, wanted: Scaled) -> float:
    def asked(scale: float) -> float:
        shares = wanted(scale)
        return math.fsum(shares[x.name] * x.dense_cost for x in layers)  # in any order the same

    if abs(asked(1.0) - budget) <= 1.0:
        return 1.0  # the usual case, exactly as the formula says
    low, high = 0.0, 1.0
    while asked(high) < budget and high < 1e9:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if asked(middle) <= budget else (low, middle)
    return low


def _floor(layer: LayerRef, share: float, ideal: float) -> int | None:
    if share >= 1 - 1e-9:
        return None
    least = least_rank(layer)
    return least and min(max(least, int(ideal + 1e-9)), layer.paying_rank)


def _may_shrink(layer: LayerRef, share: Share) -> bool:
    return share.rank is None and layer.paying_rank >= 1
