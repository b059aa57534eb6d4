"""What prices and widths buy: within the budget, never worse for more, best where a slope ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compress_core.allocate.base import Allocator, Evidence, budget_of, price_of
from compress_core.allocate.fisher import Fisher
from compress_core.allocate.predict import rounded
from compress_core.allocate.prices import Prices
from compress_core.allocate.widths import Widths
from compress_core.coding.expected import steps_squared
from compress_core.coding.expected_entries import level_counts
from compress_core.coding.parts import code_layer
from compress_core.coding.settings import Coding
from compress_core.coding.whole import of_whole
from compress_core.decompose import LowRank
from compress_core.errors import BudgetError, ConfigError
from compress_core.forms.kinds import in_codes, pays, sizes_of
from compress_core.forms.names import FACTORS, FULL, WIDTHS
from compress_core.layer.stored import pack_layer
from compress_core.sparse import PLACES, Sparse
from compress_core.types import LayerRef, Share
from tests.made_up import SEEDS, codes_of, columns_of, entries_of, layers_of, predicted_of

TINY = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5)
KEPT = st.floats(0.02, 1.0)
BITS = st.sampled_from([FULL, *WIDTHS])
GROUPS = st.sampled_from([1, 5, 32])
ALLOCATORS: dict[str, Allocator] = {
    "prices": Prices(),
    "prices of one width": Prices(codes=False),
    "prices of entries": Prices(entries=True),
    "prices of columns": Prices(entries=True, columns=True),
    "mixed widths": Widths(mixed=True),
}


def evidence_of(layers: Sequence[LayerRef], seed: int) -> Evidence:
    """Curves of cuts and of codes for all ranks that any width of codes may have."""
    wide = [replace(x, bits=FULL, group=32) for x in layers]
    most = [max(x, y, key=lambda z: z.paying_rank) for x, y in zip(layers, wide, strict=True)]
    return Evidence(
        predicted={x.name: predicted_of(x, seed) for x in most},
        codes={x.name: codes_of(x, seed) for x in most},
        entries={x.name: entries_of(x, seed) for x in layers},
        columns={x.name: columns_of(x, seed) for x in layers},
    )


def divided(
    allocator: Allocator, layers: Sequence[LayerRef], kept: float, evidence: Evidence
) -> dict[str, Share]:
    """The shares, where the budget is not refused."""
    try:
        allocator.check(layers, kept)
    except BudgetError:
        assume(False)
    return allocator.allocate(layers, kept, evidence)


def cost_of(layers: Sequence[LayerRef], shares: Mapping[str, Share]) -> int:
    return sum(price_of(x, shares[x.name]) for x in layers)


def left_by(layers: Sequence[LayerRef], shares: Mapping[str, Share], evidence: Evidence) -> float:
    return rounded(layers, evidence, shares)


def shares_of(name: str, layer: LayerRef) -> list[Share]:
    """All that a layer may be given."""
    widths = [None, *WIDTHS] if name != "prices of one width" else [None]
    found = [Share(None, bits=bits) for bits in widths]
    if name == "mixed widths":
        return found
    for bits in widths:
        most = layer.paying_rank
        if bits is not None:
            most = min(most, replace(layer, bits=bits).paying_rank)
        found += [Share(rank, bits=bits) for rank in range(1, most + 1)]
        if name in ("prices of entries", "prices of columns"):
            numbers = layer.out_features * layer.in_features
            found += [Share(0, count, bits) for count in level_counts(numbers)]
        if name == "prices of columns":
            counts = level_counts(layer.in_features)
            of_columns = [Share(0, bits=bits, columns=count) for count in counts]
            found += [
                x
                for x in of_columns
                if pays(layer.out_features, layer.in_features, entry_of(layer, x))
            ]
    return found


def entry_of(layer: LayerRef, share: Share) -> dict[str, Any]:
    """What an entry says of a layer of columns."""
    sizes = sizes_of(layer.out_features, layer.in_features, {"columns": share.columns})
    entry = {"rank": 0, "columns": share.columns}
    return in_codes(entry, sizes, share.bits or FULL, layer.group)


@pytest.mark.parametrize("name", ALLOCATORS)
@settings(max_examples=60, deadline=None)
@given(shapes=TINY, form=st.sampled_from(FACTORS), bits=BITS, group=GROUPS, kept=KEPT, seed=SEEDS)
def test_they_never_overspend(
    name: str,
    shapes: list[tuple[int, int]],
    form: str,
    bits: int,
    group: int,
    kept: float,
    seed: int,
) -> None:
    """Layers of one number among them, in groups longer than a row, and all in one width."""
    bits = bits if name == "prices of one width" else FULL
    layers = [replace(x, bits=bits, group=group) for x in layers_of(shapes, form)]
    shares = divided(ALLOCATORS[name], layers, kept, evidence_of(layers, seed))
    assert cost_of(layers, shares) <= budget_of(layers, kept)
    for layer in [x for x in layers if shares[x.name].columns]:
        assert pays(layer.out_features, layer.in_features, entry_of(layer, shares[layer.name]))


@pytest.mark.parametrize("name", ALLOCATORS)
@settings(max_examples=60, deadline=None)
@given(shapes=TINY, form=st.sampled_from(FACTORS), bits=BITS, low=KEPT, high=KEPT, seed=SEEDS)
def test_more_budget_is_never_predicted_worse(
    name: str,
    shapes: list[tuple[int, int]],
    form: str,
    bits: int,
    low: float,
    high: float,
    seed: int,
) -> None:
    bits = bits if name == "prices of one width" else FULL
    layers = [replace(x, bits=bits) for x in layers_of(shapes, form)]
    evidence = evidence_of(layers, seed)
    few, many = (
        left_by(layers, divided(ALLOCATORS[name], layers, kept, evidence), evidence)
        for kept in sorted((low, high))
    )
    assert many <= few * (1 + 1e-12)


@pytest.mark.parametrize("name", ALLOCATORS)
@settings(max_examples=60, deadline=None)
@given(
    shapes=TINY,
    form=st.sampled_from(FACTORS),
    bits=BITS,
    slope=st.floats(1e-4, 10).map(lambda x: x**2),
    seed=SEEDS,
)
def test_where_every_layer_is_best_at_one_slope_nothing_better_can_be_bought(
    name: str, shapes: list[tuple[int, int]], form: str, bits: int, slope: float, seed: int
) -> None:
    """Shares that each have the least loss + slope · cost are the best of all for their cost."""
    bits = bits if name == "prices of one width" else FULL
    layers = [replace(x, bits=bits) for x in layers_of(shapes, form)]
    evidence = evidence_of(layers, seed)

    def worth(layer: LayerRef, share: Share) -> float:
        return left_by([layer], {layer.name: share}, evidence) + slope * price_of(layer, share)

    best = {
        x.name: min(shares_of(name, x), key=lambda share, x=x: worth(x, share))  # type: ignore[misc]
        for x in layers
    }
    whole = sum(x.dense_cost for x in layers)
    assume(cost_of(layers, best) <= whole)
    kept = cost_of(layers, best) / whole
    found = divided(ALLOCATORS[name], layers, kept, evidence)
    least = left_by(layers, best, evidence)
    assert left_by(layers, found, evidence) == pytest.approx(least, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(shapes=TINY, form=st.sampled_from(FACTORS), kept=KEPT, seed=SEEDS)
def test_without_codes_prices_buy_what_fisher_buys(
    shapes: list[tuple[int, int]], form: str, kept: float, seed: int
) -> None:
    layers = layers_of(shapes, form)
    evidence = evidence_of(layers, seed)
    shares = divided(Prices(codes=False), layers, kept, evidence)
    assert shares == Fisher().allocate(layers, kept, evidence)


def test_what_rounding_costs_is_in_the_price_where_all_layers_have_one_width() -> None:
    """A whole weight whose codes cost more than those of a product, cut and all, is not bought."""
    layer = LayerRef("a", 0, 40, 40, "a", bits=2)
    ranks = layer.paying_rank
    cut = torch.linspace(1, 0.1, ranks + 1, dtype=torch.float64)
    codes = torch.zeros(ranks + 2, dtype=torch.float64)
    exact = Evidence(predicted={"a": cut}, codes={"a": codes})
    assert Prices(codes=False).allocate([layer], 1.0, exact) == {"a": Share(None)}
    codes = codes.index_fill(0, torch.tensor(0), 0.2 * steps_squared(2))
    coarse = Evidence(predicted={"a": cut}, codes={"a": codes})
    assert Prices(codes=False).allocate([layer], 1.0, coarse) == {"a": Share(ranks)}


@settings(max_examples=60, deadline=None)
@given(shapes=TINY, kept=KEPT, bits=st.sampled_from([0, *WIDTHS]), group=GROUPS)
def test_one_width_for_all_is_the_widest_that_the_budget_holds(
    shapes: list[tuple[int, int]], kept: float, bits: int, group: int
) -> None:
    layers = [replace(x, group=group) for x in layers_of(shapes)]
    shares = divided(Widths(bits), layers, kept, Evidence())
    (width,) = {share.bits for share in shares.values()}
    assert width is not None and {share.rank for share in shares.values()} == {None}
    assert cost_of(layers, shares) <= budget_of(layers, kept)
    if bits:
        assert width == bits
    for wider in (FULL, *WIDTHS):
        if not bits and wider > width:
            more = {x.name: Share(None, bits=wider) for x in layers}
            assert cost_of(layers, more) > budget_of(layers, kept)


@pytest.mark.parametrize("widths", [Widths(), Widths(3), Widths(mixed=True)])
def test_a_budget_that_holds_no_codes_is_refused_with_one_that_does(widths: Widths) -> None:
    layers = layers_of([(37, 41), (5, 3), (64, 32)])
    with pytest.raises(BudgetError, match=r"which take 0\.\d{4} of 16 bits each") as refusal:
        widths.check(layers, 0.1)
    needed = float(str(refusal.value).partition("which take ")[2].split()[0])
    widths.check(layers, needed)
    with pytest.raises(BudgetError):
        widths.check(layers, needed - 2e-4)


def test_a_width_is_one_that_codes_have_and_not_said_twice() -> None:
    with pytest.raises(ConfigError, match="codes have 8, 6, 5, 4, 3, 2 bits, got 7"):
        Widths(7)
    with pytest.raises(ConfigError, match="bits=4 is one width for all: leave it out, or mixed"):
        Widths(4, mixed=True)


@settings(max_examples=80, deadline=None)
@given(
    out=st.integers(1, 40),
    into=st.integers(1, 40),
    form=st.sampled_from(FACTORS),
    bits=st.sampled_from(WIDTHS),
    group=GROUPS,
    part=st.floats(0.01, 1),
)
def test_a_share_costs_what_the_layer_then_stores(
    out: int, into: int, form: str, bits: int, group: int, part: float
) -> None:
    """Short groups, rows shorter than a group, codes that fill no byte, and a layer's own bias."""
    layer = LayerRef("a", 0, out, into, "a", form=form, group=group)
    weight = torch.randn(out, into, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    coding = Coding(bits, group, rounding="nearest")
    rank = math.ceil(part * replace(layer, bits=bits).paying_rank)
    assume(rank > 0)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    cut = LowRank(u[:, :rank] * s[:rank], v[:rank])
    mask = weight.abs() >= weight.abs().median()
    some, none = Sparse.of(weight, mask), torch.zeros
    entries = LowRank(none(out, 0).double(), none(0, into).double(), sparse=some)
    index = torch.arange(0, into, 2)[: into - 1]
    columns = LowRank(
        none(out, 0).double(), none(0, into - len(index)).double(), weight[:, index], index
    )
    bias = torch.ones(out, dtype=torch.float64)
    for share, low in (
        (Share(None, bits=bits), of_whole(weight)),
        (Share(rank, bits=bits), cut),
        (Share(0, some.nonzeros, bits), entries),
        (Share(0, bits=bits, columns=len(index)), columns),
    ):
        for more in (None, bias):
            parts = code_layer(replace(low, bias=more), None, coding, form, torch.float16)
            stored = pack_layer(parts, torch.float16, layer.dense_cost, own=True, form=form)
            numbers = share.cost(layer) + (0 if more is None else out)
            assert stored.attrs["numbers"] == numbers
            sizes = {x: t.numel() * t.itemsize for x, t in stored.tensors.items()}
            places = [sizes.pop(x) for x in PLACES if x in sizes]
            assert 0 <= 2 * numbers - sum(sizes.values()) < 2 * len(sizes)
            priced = price_of(layer, share) - share.cost(layer)
            assert priced == -(-sum(places) // 2)
