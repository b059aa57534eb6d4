"""A budget is never overspent, more of it never buys less, and an impossible one is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core.allocate.base import Evidence
from compress_core.allocate.uniform import Uniform
from compress_core.errors import BudgetError, ConfigError
from compress_core.types import Budget, Share, Stack, affordable
from tests.made_up import SHAPES, layers_of


@settings(max_examples=200, deadline=None)
@given(shapes=SHAPES, kept=st.floats(0.01, 1.0))
def test_uniform_is_within_one_component_below_every_layers_budget(
    shapes: list[tuple[int, int]], kept: float
) -> None:
    layers = layers_of(shapes)
    try:
        shares = Uniform().allocate(layers, kept, Evidence())
    except BudgetError:
        assert any(affordable(kept, layer.dense_cost) < layer.atom_cost for layer in layers)
        return
    for layer in layers:
        budget = affordable(kept, layer.dense_cost)
        cost = shares[layer.name].cost(layer)
        assert budget - layer.atom_cost < cost <= budget
        assert shares[layer.name].rank is None or cost < layer.dense_cost


@settings(max_examples=100, deadline=None)
@given(shapes=SHAPES, low=st.floats(0.3, 1.0), high=st.floats(0.3, 1.0))
def test_more_budget_never_keeps_less(
    shapes: list[tuple[int, int]], low: float, high: float
) -> None:
    layers = layers_of(shapes)
    try:
        few, many = (Uniform().allocate(layers, k, Evidence()) for k in sorted((low, high)))
    except BudgetError:
        return
    assert all(few[x.name].cost(x) <= many[x.name].cost(x) for x in layers)


def test_all_of_it_keeps_every_layer_dense() -> None:
    layers = layers_of([(4, 4), (6, 3), (30, 20)])
    assert set(Uniform().allocate(layers, 1.0, Evidence()).values()) == {Share(None)}


def test_factors_that_would_cost_what_the_dense_weight_costs_are_not_made() -> None:
    layers = layers_of([(4, 4)])  # rank 2 costs 16, and so does the weight
    shares = Uniform().allocate(layers, 1 - 1e-12, Evidence())
    assert set(shares.values()) == {Share(None)}


def test_the_papers_rank() -> None:
    layer = layers_of([(4096, 11008)])[0]
    rank = Uniform().allocate([layer], 0.8, Evidence())[layer.name].rank
    assert rank == int(4096 * 11008 * 0.8 / (4096 + 11008))


@pytest.mark.parametrize("kept", [0.0, -0.1, 1.01, float("nan"), 20.0])
def test_kept_outside_its_range_is_refused(kept: float) -> None:
    with pytest.raises(ConfigError, match=r"kept must be in \(0, 1\]"):
        Budget(kept)


def test_kept_of_the_model_counts_what_is_outside_the_layers() -> None:
    layers = layers_of([(10, 10)])
    assert Budget(0.5, "model").of_compressible(layers, 120) == pytest.approx(0.4)
    assert Budget(0.5).of_compressible(layers, 120) == 0.5
    with pytest.raises(BudgetError, match="embeddings, norms and head alone"):
        Budget(0.1, "model").of_compressible(layers, 120)


def test_a_layer_without_a_component_is_refused_with_the_smallest_budget_that_works() -> None:
    layers = layers_of([(100, 100), (4, 4)])
    with pytest.raises(BudgetError, match=r"o_proj \(4x4\).*at least 0\.5"):
        Uniform().allocate(layers, 0.3, Evidence())
    Uniform().allocate(layers, 0.5001, Evidence())


def test_a_layer_too_thin_for_any_component_is_dense_or_refused() -> None:
    layers = layers_of([(1, 50), (60, 60)])
    assert layers[0].paying_rank == 0
    with pytest.raises(BudgetError, match=r"q_proj \(1x50\).*at least 1\.0"):
        Uniform().check(layers, 0.9)
    assert set(Uniform().allocate(layers, 1.0, Evidence()).values()) == {Share(None)}


@settings(max_examples=60, deadline=None)
@given(widths=st.lists(st.integers(1, 60), min_size=1, max_size=4), features=st.integers(1, 60))
def test_a_stack_is_one_layer_of_all_rows(widths: list[int], features: int) -> None:
    members = layers_of([(width, features) for width in widths])
    one = Stack(tuple(members)).as_layer
    assert (one.out_features, one.in_features) == (sum(widths), features)
    assert one.dense_cost == sum(member.dense_cost for member in members)
    assert one.atom_cost <= sum(member.atom_cost for member in members)  # one in-factor for all
    assert one.name == " + ".join(member.name for member in members)
    assert (one.block, one.tap) == (members[0].block, members[0].tap)


@settings(max_examples=200, deadline=None)
@given(cost=st.integers(1, 10**9), part=st.floats(0, 1))
def test_affordable_is_floored_and_binary_rounding_does_not_lose_one(
    cost: int, part: float
) -> None:
    numbers = round(part * cost)
    assert affordable(numbers / cost, cost) == numbers
    assert affordable((numbers + 0.5) / cost, cost) == numbers
