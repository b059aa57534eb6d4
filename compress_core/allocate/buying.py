"""Buying by falling slope: what one number stored takes away most divergence comes first."""

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from compress_core.allocate.base import least_rank
from compress_core.types import LayerRef, Share

Point = tuple[int, float, Share]  # numbers stored, predicted divergence, share


def curve_of(layer: LayerRef, divergence: Callable[[int], float]) -> Iterator[Point]:
    """A layer's points: every rank that pays, and the dense weight, which loses nothing.

    Args:
        layer: The layer.
        divergence: What is predicted at a rank.
    """
    least = least_rank(layer)
    if least is not None:
        for rank in range(least, layer.paying_rank + 1):
            share = Share(rank)
            yield share.cost(layer), divergence(rank), share
    yield layer.dense_cost, 0.0, Share(None)


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of points sorted by cost, then by divergence, as far as it falls."""
    hull: list[Point] = []
    for point in points:
        if hull and (hull[-1][0] == point[0] or hull[-1][1] < point[1]):
            continue
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
