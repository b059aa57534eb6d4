"""Equal slope: components are bought where one number stored takes away most divergence.

A layer's predicted divergence at rank r is s · loss(r), with loss the output error left and s its
measured sensitivity: the model's KL when that layer alone is cut hard, per unit of output error.
"""

import heapq
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress_core.allocate.base import (
    Evidence,
    Probe,
    budget_of,
    check_one_component_each,
    least_rank,
    share_at,
)
from compress_core.errors import ConfigError
from compress_core.types import LayerRef, Share

Point = tuple[int, float, Share]  # numbers stored, predicted divergence, share


@dataclass(frozen=True)
class Hull:
    """Components where one number stored takes away most divergence, at an equal slope.

    Greedy on the lower convex hull of every layer's (cost, predicted divergence) curve. The curve
    ends with the dense weight, which costs out · in and loses nothing; factors just below that cost
    lose much, so only the hull makes greedy buying optimal. Relative output energy in place of s
    loses to uniform ranks on small models; a measured s does not.

    The sensitivity is measured on the otherwise dense model, so one table serves every budget.

    Attributes:
        probe_share: Share that a layer is cut to when its sensitivity is measured, in (0, 1).
        probe_windows: Calibration windows for that.
    """

    probe_share: float = 0.1
    probe_windows: int = 32
    reads: ClassVar[frozenset[str]] = frozenset({"losses", "divergence"})

    def __post_init__(self) -> None:
        if not 0 < self.probe_share < 1:
            raise ConfigError(f"probe_share is in (0, 1), got {self.probe_share:g}")
        check_windows(self.probe_windows)

    def probe(self, kept: float) -> Probe | None:
        """One cut per layer, all others dense."""
        return Probe(None, (self.probe_share,), self.probe_windows)

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Refuses a budget that cannot hold one component of every layer.

        Raises:
            BudgetError: It cannot.
        """
        check_one_component_each(layers, kept)

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """Buys the steepest segments of all hulls that still fit."""
        curves = {}
        for layer in layers:
            (divergence,) = evidence.divergence[layer.name]
            loss = evidence.losses[layer.name]
            weight = sensitivity(layer, loss, divergence, self.probe_share)
            curves[layer.name] = list(_curve(layer, loss, weight))
        return buy(layers, budget_of(layers, kept), curves)


def check_windows(windows: int) -> None:
    """Refuses a probe without windows.

    Raises:
        ConfigError: There are none.
    """
    if windows < 1:
        raise ConfigError(f"probe_windows must be at least 1, got {windows}")


def sensitivity(layer: LayerRef, loss: Tensor, divergence: float, share: float) -> float:
    """KL per unit of output error at the probed share; 0 where the cut loses nothing."""
    rank = share_at(layer, share).rank
    if rank is None or not float(loss[rank]) > 0:
        return 0.0
    return max(0.0, divergence) / float(loss[rank])


def _curve(layer: LayerRef, loss: Tensor, weight: float) -> Iterator[Point]:
    least = least_rank(layer)
    if least is not None:
        for rank in range(least, layer.paying_rank + 1):
            share = Share(rank)
            yield share.cost(layer), weight * float(loss[rank]), share
    yield layer.dense_cost, 0.0, Share(None)


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of points sorted by cost."""
    hull: list[Point] = []
    for point in points:
        while len(hull) >= 2 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(first: Point, middle: Point, last: Point) -> bool:
    """Whether ``middle`` lies on or above the line from ``first`` to ``last``."""
    (c0, d0, _), (c1, d1, _), (c2, d2, _) = first, middle, last
    return (d1 - d0) * (c2 - c0) >= (d2 - d0) * (c1 - c0)


def buy(
    layers: Sequence[LayerRef], budget: int, curves: Mapping[str, Sequence[Point]]
) -> dict[str, Share]:
    """Of all steps that still fit takes the steepest, until none fits.

    The steepest is on the hull of the points that fit; a layer whose next step does not fit any
    more gets a new hull of those that do. What a larger budget buys is never worse: at the first
    step that fits it and not the smaller one, it alone gains more than all that the smaller one
    can still buy.
    """
    hulls = {layer.name: deque(lower_hull(curves[layer.name])) for layer in layers}
    left = budget - sum(hull[0][0] for hull in hulls.values())
    queue = [(_slope(hull), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        hull = hulls[name]
        here = hull[0][0]
        if hull[1][0] - here <= left:
            hull.popleft()
            left -= hull[0][0] - here
        else:
            fitting = [point for point in curves[name] if here <= point[0] <= here + left]
            hull = hulls[name] = deque(lower_hull(fitting))
        if len(hull) > 1:
            heapq.heappush(queue, (_slope(hull), name))
    return {name: hull[0][2] for name, hull in hulls.items()}


def _slope(hull: Sequence[Point]) -> float:
    """Change of divergence per number at the first step, negative: the steepest sorts first."""
    (cost, divergence, _), (next_cost, next_divergence, _) = hull[0], hull[1]
    return (next_divergence - divergence) / (next_cost - cost)
