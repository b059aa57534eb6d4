"""Buying priced items in the order of their scores, without sorting them all.

Scores are counted by the upper 16 bits of their pattern, which are in the order of the scores: what
lies above the bin in which the money ends is bought unsorted, and only that bin and a little below
it is sorted. What is bought is to the item what a sort of everything would buy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 1 << 16
PIECE = 1 << 22  # items looked at at a time
AHEAD = 1 << 12  # items sorted at a time, at least; doubled from time to time


@dataclass(frozen=True)
class Run:
    """Items of one price in a row.

    Attributes:
        score: Larger is better, float32 (items,); ties go by place, in the order of the runs.
        taken: Which are bought, bool (items,); what is bought is marked here.
        price: Of each.
    """

    score: Tensor
    taken: Tensor
    price: int

    def pieces(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Where a piece begins, the bins of its items (int32; BINS where taken), and ``taken``."""
        pairs = zip(self.score.split(PIECE), self.taken.split(PIECE), strict=True)
        for number, (score, taken) in enumerate(pairs):
            bins = (ordered(score) >> 16) + BINS // 2
            yield number * PIECE, bins.masked_fill_(taken, BINS), taken


def buy(runs: Sequence[Run], room: int) -> int:
    """Marks what is bought, best first, passing over what does not fit into what is left.

    Args:
        runs: The items.
        room: Whole numbers that may be spent.

    Returns:
        The room that is left.
    """
    top, ahead = BINS, AHEAD  # bins from ``top`` on are settled
    while runs := [run for run in runs if len(run.score) and run.price <= room]:
        counts, costs = _histogram(runs, top)
        total = costs.flip(0).cumsum(0).flip(0)  # of a bin and all above it
        whole = int((total > room).sum())  # bins from here to ``top`` are affordable
        _take(runs, whole, top)
        if whole == 0:
            return room - int(total[0])
        room -= int(total[whole]) if whole < top else 0
        above = counts[:whole].flip(0).cumsum(0)
        top = max(0, whole - 1 - int((above < ahead).sum()))
        room = _fill(runs, top, whole, room)
        ahead *= 2
        if top == 0:
            return room
    return room


def ordered(score: Tensor) -> Tensor:
    """int32 in the order of float32 scores; both zeros are one."""
    bits = (score + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _histogram(runs: Sequence[Run], top: int) -> tuple[Tensor, Tensor]:
    """How many items there are below ``top`` in each bin, and what they cost, int64 (top,)."""
    counts = torch.zeros(top, dtype=torch.int64)
    costs = torch.zeros(top, dtype=torch.int64)
    for run in runs:
        of_run = torch.zeros(top, dtype=torch.int64)
        for _, bins, _ in run.pieces():
            of_run += torch.bincount(bins, minlength=BINS + 1)[:top]
        counts += of_run
        costs += run.price * of_run
    return counts, costs


def _take(runs: Sequence[Run], lower: int, upper: int) -> None:
    """Marks all items in bins [lower, upper)."""
    for run in runs:
        for _, bins, taken in run.pieces():
            taken |= (bins >= lower) & (bins < upper)


def _fill(runs: Sequence[Run], lower: int, upper: int, room: int) -> int:
    """Buys of the items in bins [lower, upper), in their order, and says what room is left."""
    scores, prices, places = [], [], []
    for number, run in enumerate(runs):
        for start, bins, _ in run.pieces():
            found = ((bins >= lower) & (bins < upper)).nonzero().flatten() + start
            scores.append(run.score[found])
            prices.append(torch.full_like(found, run.price))
            places.append(torch.stack([torch.full_like(found, number), found]))
    score, price, place = torch.cat(scores), torch.cat(prices), torch.cat(places, dim=1)
    order = torch.argsort(score, descending=True, stable=True)
    bought, room = fill(order, price, room)
    for number, run in enumerate(runs):
        of_run, items = place[:, bought]
        run.taken[items[of_run == number]] = True
    return room


def fill(order: Tensor, prices: Tensor, room: int) -> tuple[Tensor, int]:
    """Buys items in their order, passing over what does not fit into what is left.

    Args:
        order: Indices of the items that may be bought, best first, int64.
        prices: Of all items.
        room: Whole numbers that may be spent.

    Returns:
        The indices bought, and the room that is left.
    """
    bought: list[Tensor] = []
    while len(order):
        total = prices[order].cumsum(0, dtype=torch.int64)
        count = int(torch.searchsorted(total, room, right=True))
        if count:
            bought.append(order[:count])
            room -= int(total[count - 1])
        rest = order[count:]
        order = rest[prices[rest] <= room]
    return (torch.cat(bought) if bought else order), room
