"""Which entries stay: exactly as many as asked for, the best, the same every time."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_core.allocate.base import Evidence
from compress_core.allocate.entries import Entries
from compress_core.errors import BudgetError, ConfigError, NumericsError
from compress_core.prune.select import (
    Pattern,
    best_of_all,
    best_of_groups,
    best_of_rows,
    read_pattern,
)
from compress_core.types import LayerRef, Share, affordable
from tests.made_up import SEEDS, SHAPES, layers_of

PATTERNS = st.sampled_from(["1:2", "2:4", "1:4", "4:8", "2:8", "3:5"])


def scores_of(rows: int, columns: int, seed: int) -> torch.Tensor:
    """With ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, (rows, columns), generator=generator).double()


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("broken", [1, 7])
def test_scores_that_are_no_numbers_are_refused(count: int, broken: int) -> None:
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    scores.view(-1)[:broken] = torch.nan
    with pytest.raises(NumericsError, match="not finite"):
        best_of_all(scores, count)


@given(st.integers(1, 9), st.integers(1, 9), SEEDS, st.floats(0, 1))
def test_the_best_of_all_and_of_rows_are_exactly_so_many(
    rows: int, columns: int, seed: int, part: float
) -> None:
    scores, count = scores_of(rows, columns, seed), int(part * rows * columns)
    of_all, of_rows = best_of_all(scores, count), best_of_rows(scores, count)
    assert int(of_all.sum()) == int(of_rows.sum()) == count
    if 0 < count < rows * columns:
        assert scores[of_all].min() >= scores[~of_all].max()
    for mask, row in zip(of_rows, scores, strict=True):
        assert int(mask.sum()) in (count // rows, -(-count // rows))
        if mask.any() and not mask.all():
            assert row[mask].min() >= row[~mask].max()
    assert torch.equal(of_rows, best_of_rows(scores.clone(), count))


@given(st.integers(1, 4), st.integers(1, 5), SEEDS, st.floats(0, 1))
def test_no_choice_of_equal_rows_is_worth_more(
    rows: int, columns: int, seed: int, part: float
) -> None:
    """Of all masks whose rows differ by at most one entry, by brute force."""
    scores, count = scores_of(rows, columns, seed), int(part * rows * columns)
    least, extra = divmod(count, rows)
    of_row = [
        {
            k: max(sum(c) for c in itertools.combinations(row, k))
            for k in (least, least + bool(extra))
        }
        for row in scores.tolist()
    ]
    best = max(
        sum(of_row[r][least + (r in chosen)] for r in range(rows))
        for chosen in itertools.combinations(range(rows), extra)
    )
    assert float(scores[best_of_rows(scores, count)].sum()) == best


@given(st.integers(1, 6), st.integers(1, 4), SEEDS, PATTERNS)
def test_n_of_every_m_stay_and_they_are_the_best_of_them(
    rows: int, groups: int, seed: int, text: str
) -> None:
    pattern = read_pattern(text)
    assert pattern is not None
    scores = scores_of(rows, groups * pattern.of, seed)
    mask = best_of_groups(scores, pattern).view(rows, groups, pattern.of)
    assert bool((mask.sum(dim=2) == pattern.keep).all())
    grouped = scores.view_as(mask)
    worst_kept = grouped.masked_fill(~mask, 99).amin(dim=2)
    assert bool((worst_kept >= grouped.masked_fill(mask, -1).amax(dim=2)).all())


@pytest.mark.parametrize("text", ["", "2", "0:4", "4:4", "5:4", "2:4:8", "a:b", "-1:2", "2:4 "])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="pattern is 'unstructured' or N:M"):
        read_pattern(text)
    assert read_pattern("unstructured") is None
    assert read_pattern("2:4") == Pattern(2, 4)


@given(SHAPES, st.floats(0.05, 0.99), st.floats(0, 0.99))
def test_every_layer_stores_exactly_its_share_of_numbers(
    shapes: list[tuple[int, int]], kept: float, low_rank: float
) -> None:
    layers, allocator = layers_of(shapes), Entries(low_rank=low_rank)
    if any(affordable(kept, layer.dense_cost) < 1 for layer in layers):
        with pytest.raises(BudgetError, match="without a single entry"):
            allocator.check(layers, kept)
        return
    allocator.check(layers, kept)
    shares = allocator.allocate(layers, kept, Evidence())
    for layer in layers:
        share, numbers = shares[layer.name], affordable(kept, layer.dense_cost)
        assert share.cost(layer) == numbers and share.nonzeros >= 1
        assert share.rank is not None
        assert share.rank * layer.atom_cost <= low_rank * numbers + 1e-6
        assert (share.rank + 1) * layer.atom_cost > low_rank * numbers - 1e-6


def test_everything_kept_is_dense() -> None:
    layers = layers_of([(8, 8), (4, 8)])
    shares = Entries(low_rank=0.3).allocate(layers, 1.0, Evidence())
    assert set(shares.values()) == {Share(None)}


SQUARES = [LayerRef(f"model.layers.0.{kind}", 0, 40, 40, kind) for kind in "qo"]


@pytest.mark.parametrize(
    ("allocator", "fits", "share"),
    [
        (Entries(pattern="2:4"), 0.5, Share(0, 800)),
        (Entries(pattern="4:8"), 0.5, Share(0, 800)),
        (Entries(pattern="1:4"), 0.25, Share(0, 400)),
        (Entries(low_rank=0.25, pattern="2:4"), 0.65, Share(3, 800)),  # 3.33 ranks, floored
        (Entries(adapter=0.1, pattern="2:4"), 0.7, Share(4, 800)),
    ],
)
def test_a_pattern_takes_the_one_budget_that_it_gives(
    allocator: Entries, fits: float, share: Share
) -> None:
    assert set(allocator.allocate(SQUARES, fits, Evidence()).values()) == {share}
    allocator.check(SQUARES, fits + 0.004)
    for kept in (fits - 0.01, fits + 0.01, 1.0):
        with pytest.raises(BudgetError) as refusal:
            allocator.check(SQUARES, kept)
        beside = " with its factors" if share.rank else ""
        assert str(refusal.value) == (
            f"pattern={allocator.pattern}{beside} keeps {fits:g} of the layers, got kept={kept:g}: "
            f"give --kept {fits:g}"
        )


def test_a_pattern_that_does_not_divide_the_inputs_is_refused() -> None:
    layers = layers_of([(8, 8), (8, 6)])
    with pytest.raises(ConfigError) as refusal:
        Entries(pattern="2:4").check(layers, 0.5)
    assert str(refusal.value) == (
        "pattern=2:4 needs inputs that 4 divides; layer model.layers.0.o_proj has 6"
    )


def test_a_budget_that_cannot_hold_the_adapter_is_refused_with_one_that_can() -> None:
    allocator, layers = Entries(adapter=0.2), layers_of([(20, 40), (20, 20)])
    with pytest.raises(BudgetError) as refusal:
        allocator.check(layers, 0.2)
    assert str(refusal.value) == (
        "kept=0.2 leaves layer model.layers.0.q_proj (20x40) without a single entry beside "
        "factors of rank 4; this model needs kept of at least 0.4025"
    )
    allocator.check(layers, 0.4025)
