"""Ranks that a device likes: multiples, never slower ones, and the budget is still kept."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core.allocate import ALLOCATORS, build_allocator
from compress_core.allocate.base import Allocator, Evidence
from compress_core.allocate.stepped import Stepped
from compress_core.allocate.uniform import Uniform
from compress_core.errors import BudgetError, ConfigError
from compress_core.methods import build_method
from compress_core.types import LayerRef, Share, affordable
from tests.made_up import SEEDS, evidence_for, layers_of

SIDES = st.tuples(st.integers(16, 90), st.integers(16, 90))


def cost_of(layers: list[LayerRef], shares: dict[str, Share]) -> int:
    """Numbers stored."""
    return sum(shares[layer.name].cost(layer) for layer in layers)


def allocate(
    allocator: Allocator, layers: list[LayerRef], kept: float, seed: int
) -> dict[str, Share]:
    """What it divides, from made-up evidence."""
    allocator.check(layers, kept)
    return allocator.allocate(layers, kept, evidence_for(allocator, layers, kept, seed))


@settings(max_examples=120, deadline=None)
@given(
    shapes=st.lists(SIDES, min_size=1, max_size=6),
    name=st.sampled_from(sorted(ALLOCATORS)),
    kept=st.floats(0.4, 1.0),
    multiple=st.sampled_from([1, 4, 8]),
    parts=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    timed=st.booleans(),
    seed=SEEDS,
)
def test_ranks_are_allowed_ones_and_the_budget_is_kept(
    shapes: list[tuple[int, int]],
    name: str,
    kept: float,
    multiple: int,
    parts: list[float],
    timed: bool,
    seed: int,
) -> None:
    layers = layers_of(shapes)
    ceilings = {
        (x.out_features, x.in_features): int(part * x.paying_rank)
        for x, part in zip(layers, parts, strict=False)
    }
    allocator = Stepped(build_allocator(name), multiple).on(ceilings if timed else {})
    try:
        shares = allocate(allocator, layers, kept, seed)
    except BudgetError:
        return
    budget = affordable(kept, sum(layer.dense_cost for layer in layers))
    assert cost_of(layers, shares) <= budget
    left = budget - cost_of(layers, shares)
    for layer in layers:
        rank = shares[layer.name].rank
        if rank is None:
            continue
        top = layer.paying_rank
        if timed:
            top = min(top, ceilings[layer.out_features, layer.in_features])
        assert rank % multiple == 0
        assert multiple <= rank <= top
        bigger = Share(rank + multiple if rank + multiple <= top else None)
        assert bigger.cost(layer) - shares[layer.name].cost(layer) > left  # nothing more fits


def test_multiples_of_one_change_nothing_of_an_allocation_that_spends_all() -> None:
    layers = layers_of([(40, 30), (30, 30), (30, 60), (64, 20)])
    for name in ("by_type", "importance", "hull"):
        inner = build_allocator(name)
        assert allocate(Stepped(inner), layers, 0.6, 1) == allocate(inner, layers, 0.6, 1)


def test_layers_that_no_factors_make_faster_stay_dense_and_the_others_pay() -> None:
    layers = layers_of([(64, 64), (64, 64), (64, 32), (64, 64)])
    slow = {(64, 64): 31, (64, 32): 0}
    inner = Uniform().allocate(layers, 0.7, Evidence())
    shares = Stepped(Uniform()).on(slow).allocate(layers, 0.7, Evidence())
    small = layers[2].name
    assert inner[small].rank == 14
    assert shares[small].rank is None
    others = [layer.name for layer in layers if layer.name != small]
    assert [inner[name].rank for name in others] == [22, 22, 22]
    ranks = [shares[name].rank or 0 for name in others]
    assert sorted(ranks) == [20, 21, 21]  # 62 components are left for three
    assert cost_of(layers, shares) <= affordable(0.7, 64 * 64 * 3 + 64 * 32)


def test_a_rank_that_is_slower_becomes_a_faster_one_or_the_dense_weight() -> None:
    layers = layers_of([(64, 64)] * 4)
    shares = Stepped(Uniform()).on({(64, 64): 16}).allocate(layers, 0.8, Evidence())
    # 0.8 is rank 25, which is slower than the dense weight; half costs 16 components
    assert sorted((share.rank or 0) for share in shares.values()) == [0, 0, 16, 16]


def test_a_shared_factor_is_judged_by_the_layers_that_use_it() -> None:
    stack = LayerRef("model.layers.0.q + model.layers.1.q", 0, 128, 64, "t")
    stepped = Stepped(Uniform(), 8).on({(64, 64): 20})
    assert stepped.largest(stack) == 16


def test_a_budget_that_cannot_be_met_is_refused_with_what_would_do() -> None:
    layers = layers_of([(64, 64)] * 4)
    with pytest.raises(
        BudgetError, match=r"4 of 4 layers dense that have none: give --kept 1 or no"
    ):
        Stepped(Uniform()).on({(64, 64): 0}).check(layers, 0.8)
    with pytest.raises(BudgetError, match=r"multiples of 16: give --kept 0.5 or a smaller --rank"):
        Stepped(Uniform(), 16).check(layers, 0.3)


@pytest.mark.parametrize(
    ("method", "why"),
    [("soco", "learns its ranks"), ("wanda", "prunes"), ("duo_svd", "trades ranks for columns")],
)
def test_methods_that_choose_their_ranks_themselves_refuse(method: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{why}: leave out --rank-multiple 8"):
        build_method(method, multiple=8)


def test_an_allocator_takes_a_device_and_a_method_without_one_does_not() -> None:
    variant = "svd@hull:probe_windows=4:device=table.json"
    found = build_method(variant, multiple=8, factors="plain")
    assert found.allocate == Stepped(build_allocator("hull", {"probe_windows": 4}), 8, "table.json")
    with pytest.raises(ConfigError, match="no option 'device'"):
        build_method("svd:device=here")
