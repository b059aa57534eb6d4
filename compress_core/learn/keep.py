"""Probabilities of keeping priced items under a budget.

Vectors run over items in one order; a price is a whole number of stored numbers, the same for many
items in a row, so that prices take no memory and nothing here makes a second vector.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALVINGS = 80  # of an interval; more than float64 can tell apart


@dataclass(frozen=True)
class Prices:
    """What items cost.

    Attributes:
        runs: How many items follow one another at one price, and that price.
    """

    runs: Sequence[tuple[int, int]]

    def __len__(self) -> int:
        return sum(count for count, _ in self.runs)

    @property
    def total(self) -> int:
        """Of all items together."""
        return sum(count * price for count, price in self.runs)

    def split(self, vector: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Views of a vector over items, each with the price of every item in it."""
        parts = vector.split([count for count, _ in self.runs])
        return zip(parts, (price for _, price in self.runs), strict=True)


def spent(probability: Tensor, prices: Prices) -> float:
    """Σ price · s, summed in float64."""
    parts = prices.split(probability)
    return sum(price * float(part.sum(dtype=torch.float64)) for part, price in parts)


def project(wanted: Tensor, prices: Prices, budget: float) -> None:
    """Moves ``wanted`` (items,) to the nearest point of {0 ≤ s ≤ 1, Σ price · s ≤ budget}.

    By the conditions of optimality that is clip(wanted − θ · price) with θ = 0, or the θ at which
    the budget is met; the spending falls with θ, which is found by halving.
    """

    def cost(theta: float) -> float:
        return _total(prices, wanted, lambda part, price: (part - theta * price).clamp(0, 1))

    theta = 0.0
    if cost(theta) > budget:
        pairs = [(part, price) for part, price in prices.split(wanted) if len(part)]
        most = max(float(part.max()) / price for part, price in pairs)  # where nothing is left
        theta = _least(lambda theta: cost(theta) <= budget, 0.0, most)
    for part, price in prices.split(wanted):
        part.sub_(theta * price).clamp_(0, 1)


def shift(wanted: Tensor, prices: Prices, budget: float) -> None:
    """Moves ``wanted`` (items,) to clip(wanted − θ) with the θ at which Σ price · s is ``budget``.

    One θ for all: whatever an item costs, none overtakes another. A budget for more than all of
    them makes every s one.
    """
    if prices.total <= budget:
        wanted.fill_(1.0)
        return

    def fits(theta: float) -> bool:
        return _total(prices, wanted, lambda part, _: (part - theta).clamp(0, 1)) <= budget

    if len(wanted):
        theta = _least(fits, float(wanted.min()) - 1, float(wanted.max()))
        wanted.sub_(theta).clamp_(0, 1)


def probabilities(logits: Tensor, prices: Prices, budget: float) -> Tensor:
    """sigmoid(logits − θ), with the θ at which Σ price · s is the budget (items,).

    Args:
        logits: Larger for what is better kept; −inf where it is worth nothing.
        prices: Of the items.
        budget: Above 0; where it pays for everything, that is what is kept.
    """
    if prices.total <= budget:
        return torch.ones_like(logits)
    known = logits[logits.isfinite()]
    if not len(known):
        return torch.zeros_like(logits)
    low, high = float(known.min()) - 50.0, float(known.max()) + 50.0
    del known

    def fits(theta: float) -> bool:
        return _total(prices, logits, lambda part, _: torch.sigmoid(part - theta)) <= budget

    return torch.sigmoid(logits - _least(fits, low, high))


def _total(prices: Prices, vector: Tensor, moved: Callable[[Tensor, int], Tensor]) -> float:
    """Σ price · moved(vector), one price at a time."""
    return sum(
        price * float(moved(part, price).sum(dtype=torch.float64))
        for part, price in prices.split(vector)
    )


def _least(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least number in [low, high] for which ``holds``, which does from some number on."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def ranking(score: Tensor, worth: Tensor) -> Tensor:
    """Indices by score, largest first; equal scores by worth, then by place (items,) int64."""
    by_worth = torch.argsort(worth, descending=True, stable=True)
    return by_worth[torch.argsort(score[by_worth], descending=True, stable=True)]
