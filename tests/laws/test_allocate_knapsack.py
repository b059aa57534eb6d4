"""The knapsack over measured KL: exactly the best combination of candidates, never overspent."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core.allocate.base import Evidence, Probe, share_at
from compress_core.allocate.knapsack import CANDIDATES, Knapsack
from compress_core.errors import BudgetError
from compress_core.types import LayerRef, Share, affordable
from tests import literal
from tests.made_up import SEEDS, evidence_for, layers_of

FEW = st.lists(st.tuples(st.integers(8, 40), st.integers(8, 40)), min_size=1, max_size=3)
KEPT = st.floats(0.25, 1.0)


def table_of(
    allocator: Knapsack, layer: LayerRef, kept: float, evidence: Evidence
) -> list[tuple[int, float]]:
    """Numbers stored and KL of a layer's candidates; of those of one cost, the last measured."""
    probe = allocator.probe(kept)
    assert probe is not None
    costs = [share_at(layer, share).cost(layer) for share in probe.shares]
    return list(dict(zip(costs, evidence.divergence[layer.name], strict=True)).items())


def best_of(tables: list[list[tuple[int, float]]], budget: int) -> float:
    """The least sum of KL of any combination within the budget."""
    return min(
        sum(change for _, change in choice)
        for choice in itertools.product(*tables)
        if sum(cost for cost, _ in choice) <= budget
    )


def reached(
    layers: list[LayerRef], tables: list[list[tuple[int, float]]], shares: dict[str, Share]
) -> float:
    """The least sum of KL among candidates that every layer's share includes."""
    return sum(
        min(change for cost, change in table if cost <= shares[x.name].cost(x))
        for x, table in zip(layers, tables, strict=True)
    )


@settings(max_examples=200, deadline=None)
@given(shapes=FEW, kept=KEPT, seed=SEEDS, noise=st.sampled_from([0.0, 0.05, 1.0]))
def test_no_combination_of_candidates_within_the_budget_is_better(
    shapes: list[tuple[int, int]], kept: float, seed: int, noise: float
) -> None:
    layers, allocator = layers_of(shapes), Knapsack()
    allocator.check(layers, kept)
    evidence = evidence_for(allocator, layers, kept, seed, noise)
    tables = [table_of(allocator, layer, kept, evidence) for layer in layers]
    shares = allocator.allocate(layers, kept, evidence)
    budget = affordable(kept, sum(layer.dense_cost for layer in layers))
    assert reached(layers, tables, shares) == pytest.approx(best_of(tables, budget), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(shapes=FEW, kept=KEPT, seed=SEEDS, resolution=st.integers(100, 400))
def test_with_coarse_units_it_is_as_good_as_with_one_unit_per_layer_less(
    shapes: list[tuple[int, int]], kept: float, seed: int, resolution: int
) -> None:
    layers, allocator = layers_of(shapes), Knapsack(resolution=resolution)
    allocator.check(layers, kept)
    evidence = evidence_for(allocator, layers, kept, seed)
    tables = [table_of(allocator, layer, kept, evidence) for layer in layers]
    shares = allocator.allocate(layers, kept, evidence)
    size = sum(layer.dense_cost for layer in layers)
    unit = max(1, size // resolution)
    budget = affordable(kept, size)
    least = sum(min(cost for cost, _ in table) for table in tables)
    assert sum(shares[x.name].cost(x) for x in layers) <= budget
    short = max(least, budget - len(layers) * unit)
    assert reached(layers, tables, shares) <= best_of(tables, short) + 1e-12


@settings(max_examples=100, deadline=None)
@given(
    shapes=FEW,
    seed=SEEDS,
    kept=st.tuples(*[st.sampled_from(CANDIDATES[2:])] * 2).filter(lambda x: x[0] != x[1]),
)
def test_more_budget_never_reaches_candidates_of_more_kl(
    shapes: list[tuple[int, int]], seed: int, kept: tuple[float, float]
) -> None:
    """At budgets that are candidates themselves, so that both choose from the same table."""
    layers, allocator = layers_of(shapes), Knapsack()
    found = []
    for each in sorted(kept):
        evidence = evidence_for(allocator, layers, each, seed)
        tables = [table_of(allocator, layer, each, evidence) for layer in layers]
        found.append(reached(layers, tables, allocator.allocate(layers, each, evidence)))
    assert found[1] <= found[0] + 1e-12


def test_the_published_rounding_overspends_where_ours_does_not() -> None:
    """Every module's cost loses up to a unit of 24 numbers, and nothing pays it back."""
    layers, allocator, kept = layers_of([(95, 105)] * 24), Knapsack(), 0.6
    evidence = evidence_for(allocator, layers, kept, seed=1)
    tables = [table_of(allocator, layer, kept, evidence) for layer in layers]
    size = sum(layer.dense_cost for layer in layers)
    budget = affordable(kept, size)
    published = literal.add_up_to_nearest(tables, budget, size)
    theirs = sum(table[index][0] for table, index in zip(tables, published, strict=True))
    assert theirs > budget + 200
    shares = allocator.allocate(layers, kept, evidence)
    assert budget - 200 < sum(shares[x.name].cost(x) for x in layers) <= budget


@pytest.mark.parametrize("kept", [0.05, 0.1, 0.101])
def test_coarse_units_do_not_refuse_the_smallest_candidates(kept: float) -> None:
    """240 layers at their cheapest fit, though every one rounded up to a unit would not."""
    layers, allocator = layers_of([(200, 200)] * 240), Knapsack(resolution=1000)
    allocator.check(layers, kept)
    shares = allocator.allocate(layers, kept, evidence_for(allocator, layers, kept, seed=0))
    cost = sum(shares[x.name].cost(x) for x in layers)
    budget = affordable(kept, 240 * 200 * 200)
    assert budget - 400 < cost <= budget


@pytest.mark.parametrize(("worth", "ranks"), [((1.0, 1.2), [2, 6]), ((2.0, 1.2), [4, 5])])
def test_what_is_left_buys_components_where_a_number_is_worth_most(
    worth: tuple[float, float], ranks: list[int]
) -> None:
    """The candidates leave 55 numbers: one component of 40, or two of the other layer's 20."""
    layers = layers_of([(10, 10), (20, 20)])
    gains = (20 * worth[0], 120 * worth[1])  # between candidates 20 and 120 numbers apart
    divergence = {x.name: [gain, 0.0] for x, gain in zip(layers, gains, strict=True)}
    allocator = Knapsack(candidates=(0.2, 0.59))
    shares = allocator.allocate(layers, 0.59, Evidence(divergence=divergence))
    assert [shares[x.name].rank for x in layers] == ranks


def test_it_measures_every_candidate_and_the_target_with_all_others_at_the_target() -> None:
    assert Knapsack().probe(0.6) == Probe(0.6, CANDIDATES, 32)
    probe = Knapsack(probe_windows=4).probe(0.55)
    assert probe == Probe(0.55, (0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0), 4)


def test_a_budget_below_the_smallest_candidates_is_refused_before_anything_is_measured() -> None:
    """One component of each would fit, but the large layer has no candidate below three."""
    layers = layers_of([(100, 100), *[(12, 12)] * 10])
    with pytest.raises(BudgetError, match=r"kept=0\.06 does not hold the smallest .* 0\.0735: ask"):
        Knapsack().check(layers, 0.06)
    Knapsack().check(layers, 0.0735)
