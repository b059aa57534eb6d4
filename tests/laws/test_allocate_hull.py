"""Buying by falling slope: optimal at the hull's vertices, near it between, layers may stay dense.

More budget is never worse.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compress_core.allocate.base import Evidence, Probe, share_at
from compress_core.allocate.hull import Hull
from compress_core.types import LayerRef, Share
from tests.made_up import SEEDS, SHAPES, evidence_for, layers_of

TINY = st.lists(st.tuples(st.integers(2, 14), st.integers(2, 14)), min_size=2, max_size=3)


def predicted(layer: LayerRef, evidence: Evidence, share: Share) -> float:
    """KL at the probed share, in proportion to the output error left."""
    probed = share_at(layer, 0.1).rank
    if share.rank is None or probed is None:
        return 0.0
    loss = evidence.losses[layer.name]
    return evidence.divergence[layer.name][0] * float(loss[share.rank]) / float(loss[probed])


def total(layers: list[LayerRef], evidence: Evidence, shares: Mapping[str, Share]) -> float:
    return sum(predicted(x, evidence, shares[x.name]) for x in layers)


def shares_of(layer: LayerRef) -> list[Share]:
    return [*(Share(rank) for rank in range(1, layer.paying_rank + 1)), Share(None)]


def every_choice(layers: list[LayerRef], evidence: Evidence) -> list[tuple[int, float]]:
    """Numbers stored and divergence predicted, of every combination of shares."""
    of_layer = [
        [(share.cost(x), predicted(x, evidence, share)) for share in shares_of(x)] for x in layers
    ]
    return [
        (sum(cost for cost, _ in choice), sum(divergence for _, divergence in choice))
        for choice in itertools.product(*of_layer)
    ]


def vertices(choices: list[tuple[int, float]]) -> list[int]:
    """Costs of the corners of the lower convex hull, by trying every slope."""
    cost, divergence = np.array(choices, dtype=float).T
    front = sorted({(c, divergence[cost == c].min()) for c in cost})
    x, y = np.array(front).T
    found, at = [0], 0
    while at < len(x) - 1:
        slopes = (y[at + 1 :] - y[at]) / (x[at + 1 :] - x[at])
        at += 1 + int(slopes.argmin())
        found.append(at)
    return [int(x[i]) for i in found]


@settings(max_examples=100, deadline=None)
@given(shapes=TINY, seed=SEEDS)
def test_it_is_optimal_at_the_hulls_vertices_and_never_behind_the_last_one(
    shapes: list[tuple[int, int]], seed: int
) -> None:
    layers, hull = layers_of(shapes), Hull()
    evidence = evidence_for(hull, layers, 0.5, seed)
    choices = every_choice(layers, evidence)
    size = sum(layer.dense_cost for layer in layers)
    corners = vertices(choices)
    assert corners[-1] == size  # all dense is the last
    best_at_corner = np.inf
    for budget in range(corners[0], size + 1):
        ours = total(layers, evidence, hull.allocate(layers, budget / size, evidence))
        best = min(divergence for cost, divergence in choices if cost <= budget)
        slack = 1e-9 * choices[0][1]
        if budget in corners:
            best_at_corner = best
            assert ours <= best + slack
        assert best - slack <= ours <= best_at_corner + slack


@settings(max_examples=300, deadline=None)
@given(shapes=SHAPES, seed=SEEDS, first=st.integers(0, 3000), more=st.integers(1, 60))
def test_more_budget_is_never_worse(
    shapes: list[tuple[int, int]], seed: int, first: int, more: int
) -> None:
    layers, hull = layers_of(shapes), Hull()
    evidence = evidence_for(hull, layers, 0.5, seed)
    size = sum(layer.dense_cost for layer in layers)
    low = first + sum(min(layer.atom_cost, layer.dense_cost) for layer in layers)
    assume(low + more <= size)
    few, many = (
        total(layers, evidence, hull.allocate(layers, budget / size, evidence))
        for budget in (low, low + more)
    )
    assert many <= few * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, seed=SEEDS, kept=st.floats(0.2, 0.95), by=st.floats(1e-3, 1e3))
def test_only_divergences_relative_to_each_other_count(
    shapes: list[tuple[int, int]], seed: int, kept: float, by: float
) -> None:
    layers, hull = layers_of(shapes), Hull()
    size = sum(layer.dense_cost for layer in layers)
    assume(sum(min(x.atom_cost, x.dense_cost) for x in layers) <= kept * size)
    found = evidence_for(hull, layers, kept, seed)
    scaled = Evidence(found.losses, {}, {x: [d[0] * by] for x, d in found.divergence.items()})
    one, other = hull.allocate(layers, kept, found), hull.allocate(layers, kept, scaled)
    assert total(layers, found, one) == pytest.approx(total(layers, found, other), rel=1e-9)


def flat(layer: LayerRef) -> torch.Tensor:
    """No structure: every component takes away the same."""
    count = min(layer.out_features, layer.in_features)
    return (count - torch.arange(layer.paying_rank + 1, dtype=torch.float64)) / count


def steep(layer: LayerRef) -> torch.Tensor:
    """A third of the error stays with each further component."""
    return 3.0 ** -torch.arange(layer.paying_rank + 1, dtype=torch.float64)


def test_a_layer_whose_factors_do_not_pay_stays_dense() -> None:
    """Rank 15 of 32 would cost 960 of 1024 numbers and leave half of the error."""
    layers = layers_of([(32, 32)] * 2)
    first, second = (layer.name for layer in layers)
    evidence = Evidence({first: flat(layers[0]), second: steep(layers[1])}, {}, {})
    for divergence in (1.0, 4.0):
        evidence = Evidence(evidence.losses, {}, {first: [divergence], second: [1.0]})
        shares = Hull().allocate(layers, (1024 + 8 * 64) / 2048, evidence)
        assert shares == {first: Share(None), second: Share(8)}


@pytest.mark.parametrize("factor", [3.0, 9.0, 81.0])
def test_the_more_sensitive_of_two_like_layers_gets_the_components_that_its_slope_is_worth(
    factor: float,
) -> None:
    """Losses fall by three per component: slopes are equal at log_3(factor) components more."""
    layers = layers_of([(64, 64)] * 2)
    losses = {layer.name: steep(layer) for layer in layers}
    evidence = Evidence(losses, {}, {layers[0].name: [factor], layers[1].name: [1.0]})
    apart = round(float(np.log(factor) / np.log(3)))
    shares = Hull().allocate(layers, (8 + 8 + apart) * 128 / 8192, evidence)
    assert [shares[x.name].rank for x in layers] == [8 + apart, 8]


def test_a_layer_that_cannot_be_felt_keeps_one_component_while_others_can_grow() -> None:
    layers = layers_of([(64, 64)] * 2)
    losses = {layer.name: steep(layer) for layer in layers}
    for unfelt in (0.0, -0.01):
        evidence = Evidence(losses, {}, {layers[0].name: [unfelt], layers[1].name: [1.0]})
        shares = Hull().allocate(layers, 16 * 128 / 8192, evidence)
        assert [shares[x.name].rank for x in layers] == [1, 15]


def test_one_probe_serves_every_budget() -> None:
    assert Hull(probe_share=0.2, probe_windows=4).probe(0.3) == Probe(None, (0.2,), 4)
    assert Hull().probe(0.3) == Hull().probe(0.9) == Probe(None, (0.1,), 32)
