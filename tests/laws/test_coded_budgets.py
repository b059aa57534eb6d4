"""Budgets where numbers go into codes, of methods that count numbers: nothing is overspent."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core.allocate import ALLOCATORS, build_allocator
from compress_core.allocate.base import Evidence, as_said, budget_of, of_price, price_of
from compress_core.allocate.entries import Entries
from compress_core.decompose import LowRank, project
from compress_core.errors import BudgetError
from compress_core.fit import Moments
from compress_core.forms.names import WIDTHS
from compress_core.forms.products import kept_cost, rank_cost
from compress_core.learn.room import share_of_numbers
from compress_core.metric import SecondMoment
from compress_core.refine.columns import PreserveColumns
from compress_core.types import LayerRef, Share
from tests.made_up import SEEDS, layers_of, weight_and_inputs

SHAPES = st.lists(st.tuples(st.integers(3, 40), st.integers(3, 40)), min_size=1, max_size=4)
CODES = st.tuples(st.sampled_from(WIDTHS), st.sampled_from([4, 32, 50]))


def priced(shapes: list[tuple[int, int]], codes: tuple[int, int]) -> list[LayerRef]:
    """Layers whose numbers will be in codes."""
    bits, group = codes
    return [replace(layer, bits=bits, group=group) for layer in layers_of(shapes)]


@given(shapes=SHAPES, codes=CODES, kept=st.floats(0.05, 1.0), low_rank=st.sampled_from([0.0, 0.3]))
def test_pruned_layers_take_all_the_room_that_they_are_given_and_no_more(
    shapes: list[tuple[int, int]], codes: tuple[int, int], kept: float, low_rank: float
) -> None:
    layers = priced(shapes, codes)
    share = of_price(kept, layers_of(shapes), layers)
    try:
        found = Entries(low_rank).allocate(layers, share, Evidence())
    except BudgetError as error:
        least = float(str(error).rpartition("at least ")[2])
        assert (
            f"kept={as_said(share, layers):g} leaves" in str(error) and least >= kept
        ) or least == 1
        return
    for layer in layers:
        one, room = found[layer.name], budget_of([layer], share)
        assert price_of(layer, one) <= room
        if one.rank is not None and one.nonzeros < layer.out_features * layer.in_features:
            more = replace(one, nonzeros=one.nonzeros + 1)
            assert price_of(layer, more) > room


@given(shapes=SHAPES, codes=CODES, kept=st.floats(0.02, 1.0), data=st.data())
@pytest.mark.parametrize("entries", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_whatever_a_learner_chooses_fits_in_codes(
    entries: bool,
    biases: bool,
    shapes: list[tuple[int, int]],
    codes: tuple[int, int],
    kept: float,
    data: st.DataObject,
) -> None:
    full, layers = layers_of(shapes), priced(shapes, codes)
    try:
        share = share_of_numbers(kept, layers, entries=entries, biases=biases)
    except BudgetError:
        assert entries or biases or not budget_of(full, kept)
        return
    if share == 1.0:
        return  # all whole weights, which fit, or a budget that is no less
    left, room = budget_of(full, share), 0
    for one, layer in zip(full, layers, strict=True):
        dense = one.dense_cost
        if dense <= left and data.draw(st.booleans()):
            left, room = left - dense, room + layer.dense_cost
            continue
        own = layer.out_features if biases and left >= layer.out_features else 0
        most = min((left - own) // one.atom_cost, min(one.out_features, one.in_features))
        rank = data.draw(st.integers(0, max(0, most)))
        left -= own + one.rank_cost(rank)
        count = data.draw(st.integers(0, min(left, dense))) if entries and left > 0 else 0
        left -= count
        room += own + price_of(layer, Share(rank, count))
    assert left >= 0 and room <= budget_of(full, kept)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_refusals_say_kept_as_it_was_typed_and_the_least_that_is_taken(name: str) -> None:
    """In codes allocators divide a share of less, which nobody typed."""
    full, layers = layers_of([(48, 40), (40, 64)]), priced([(48, 40), (40, 64)], (4, 32))
    allocator = build_allocator(name, {"codes": False} if name == "prices" else {})
    with pytest.raises(BudgetError, match=r"kept=0\.007 .*at least [\d.]+$") as refusal:
        allocator.check(layers, of_price(0.007, full, layers))
    least = float(str(refusal.value).rpartition(" ")[2])
    allocator.check(layers, of_price(least, full, layers))
    with pytest.raises(BudgetError):
        allocator.check(layers, of_price(least - 2e-4, full, layers))


@given(seed=SEEDS, codes=CODES, refit=st.booleans())
@settings(max_examples=20)
def test_columns_kept_in_place_of_ranks_take_no_more_room_in_codes(
    seed: int, codes: tuple[int, int], refit: bool
) -> None:
    bits, group = codes
    weight, inputs, _ = weight_and_inputs((20, 34), 80, seed)
    weight[:, :5] *= 6
    h = inputs.T @ inputs / len(inputs)
    fit = PreserveColumns(refit=refit, search="grid", accept=0.0, bits=bits, group=group)
    u, v, _ = project(weight, SecondMoment(h), 8)
    start = LowRank(u, v)
    found = fit.fit(weight, start, Moments(dense=h))
    columns = 0 if found.index is None else len(found.index)
    price = kept_cost("plain", found.rank, columns, 20, 34, bits, group)
    assert price <= rank_cost("plain", 8, 20, 34, 0, bits, group)


def test_in_sixteen_bits_the_price_with_columns_is_the_paper_s() -> None:
    assert kept_cost("plain", 5, 3, 20, 34) == 5 * (20 + 31) + 3 * 21
    assert kept_cost("plain", 5, 0, 20, 34, 4, 32) == rank_cost("plain", 5, 20, 34, 0, 4, 32)
