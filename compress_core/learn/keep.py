"""Probabilities of keeping priced items under a budget, and the cut that follows from them.

All vectors run over the same items, in the same order; a cost is a whole number of stored numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

HALVINGS = 80  # of an interval; more than float64 can tell apart


def project(wanted: Tensor, costs: Tensor, budget: float) -> Tensor:
    """The point of {0 ≤ s ≤ 1, Σ cost · s ≤ budget} nearest to ``wanted`` (items,).

    By the conditions of optimality it is clip(wanted − θ · cost) with θ = 0, or the θ at which the
    budget is met; the spending falls with θ, which is found by halving.

    Args:
        wanted: Any numbers, (items,).
        costs: Positive, (items,).
        budget: At least 0.
    """
    costs = costs.to(wanted.dtype)  # whole numbers times a float would be torch's default dtype

    def at(theta: float) -> Tensor:
        return torch.clamp(wanted - theta * costs, 0, 1)

    if spent(at(0.0), costs) <= budget:
        return at(0.0)
    most = float((wanted / costs).max())  # where nothing is left
    return at(_least(lambda theta: spent(at(theta), costs) <= budget, 0.0, most))


def probabilities(logits: Tensor, costs: Tensor, budget: float) -> Tensor:
    """sigmoid(logits − θ), with the θ at which Σ cost · s is the budget (items,).

    Args:
        logits: Larger for what is better kept; −inf where it is worth nothing.
        costs: Positive, (items,).
        budget: Above 0; where it pays for everything, that is what is kept.
    """
    if float(costs.sum(dtype=torch.float64)) <= budget:
        return torch.ones_like(logits)
    known = logits[logits.isfinite()]
    if not len(known):
        return torch.zeros_like(logits)
    low, high = float(known.min()) - 50.0, float(known.max()) + 50.0
    fits = _least(lambda theta: spent(_sigmoid(logits, theta), costs) <= budget, low, high)
    return _sigmoid(logits, fits)


def _sigmoid(logits: Tensor, theta: float) -> Tensor:
    return torch.sigmoid(logits - theta)


def spent(probability: Tensor, costs: Tensor) -> float:
    """Σ cost · s, summed in float64."""
    return float(torch.dot(probability.to(torch.float64), costs.to(torch.float64)))


def _least(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least number in [low, high] for which ``holds``, which does from some number on."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def fill(order: Tensor, costs: Tensor, room: int) -> tuple[Tensor, int]:
    """Buys items in their order, passing over what does not fit into what is left.

    Args:
        order: Indices of the items that may be bought, best first, int64.
        costs: Of all items.
        room: Whole numbers that may be spent.

    Returns:
        The indices bought, and the room that is left.
    """
    bought: list[Tensor] = []
    while len(order):
        total = costs[order].cumsum(0, dtype=torch.int64)
        count = int(torch.searchsorted(total, room, right=True))
        if count:
            bought.append(order[:count])
            room -= int(total[count - 1])
        rest = order[count:]
        order = rest[costs[rest] <= room]
    return (torch.cat(bought) if bought else order), room


def ranking(score: Tensor, worth: Tensor) -> Tensor:
    """Indices by score, largest first; equal scores by worth, then by place (items,) int64."""
    by_worth = torch.argsort(worth, descending=True, stable=True)
    return by_worth[torch.argsort(score[by_worth], descending=True, stable=True)]
