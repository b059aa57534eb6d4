"""Shares by importance (AdaSVD) and by type (SVD-LLM v2): the papers' formulas, in whole ranks."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compress_core.allocate.base import Evidence
from compress_core.allocate.by_type import ByType, type_of
from compress_core.allocate.importance import Importance, Measure, shares_of
from compress_core.errors import BudgetError, ConfigError, NumericsError
from compress_core.types import LayerRef, Share, affordable
from tests import literal
from tests.made_up import SEEDS, evidence_for

SIZE = 60  # of every layer, so that shares are literally the formula's
ATOM = 2 * SIZE
MEASURES = st.sampled_from(["change", "cosine"])
COSINES = st.lists(st.floats(0.5, 1.0), min_size=2, max_size=8)


def blocks_of(count: int, kinds: tuple[str, ...] = ("q_proj",)) -> list[LayerRef]:
    """Square layers of one size."""
    return [
        LayerRef(f"model.layers.{block}.{kind}", block, SIZE, SIZE, kind)
        for block in range(count)
        for kind in kinds
    ]


def rank_of(share: Share) -> int:
    """Components; the dense weight costs what 30 of them would."""
    return SIZE // 2 if share.rank is None else share.rank


def assert_whole_ranks_of(shares: dict[str, Share], wanted: dict[str, float], budget: int) -> None:
    """Every rank is the wanted one floored, or one more where what is left over paid for it."""
    ideal = {name: share * SIZE**2 / ATOM for name, share in wanted.items()}
    ranks = {name: rank_of(shares[name]) for name in wanted}
    for name, rank in ranks.items():
        assert math.floor(ideal[name] - 1e-6) <= rank <= math.floor(ideal[name] + 1e-6) + 1
    assert sum(ranks.values()) == budget // ATOM
    lacking = [ideal[name] - ranks[name] for name in wanted]
    assert max(lacking) - min(lacking) <= 1 + 1e-6  # who lacked most was first


def of_importances(measure: Measure, cosines: list[float]) -> list[float]:
    return cosines if measure == "cosine" else [1 - value for value in cosines]


@settings(max_examples=100, deadline=None)
@given(measure=MEASURES, cosines=COSINES, kept=st.floats(0.3, 0.9), below=st.floats(0, 0.2))
def test_importance_is_the_papers_formula(
    measure: Measure, cosines: list[float], kept: float, below: float
) -> None:
    layers, mrr = blocks_of(len(cosines)), kept - below
    assume(measure == "cosine" or min(cosines) < 1 - 1e-6)  # blocks that change nothing: refused
    shares = Importance(mrr, measure).allocate(
        layers, kept, Evidence(similarity=dict(enumerate(cosines)))
    )
    formula = literal.ada_cr(of_importances(measure, cosines), mrr, kept)
    assume(max(formula) < 1 - ATOM / SIZE**2)  # no clipping, nor a layer that is dense
    wanted = {layer.name: formula[layer.block] for layer in layers}
    assert_whole_ranks_of(shares, wanted, affordable(kept, len(layers) * SIZE**2))


def test_the_shares_are_those_of_the_official_figure() -> None:
    """Importance over mean in seven of 32 layers, and what is removed; trr 0.60, mrr 0.55."""
    figure = {0: 3.32, 1: 2.40, 2: 1.40, 10: 1.00, 27: 0.35, 30: 0.59, 31: 2.94}
    removed = {0: 0.284, 1: 0.33, 2: 0.38, 10: 0.40, 27: 0.4325, 30: 0.4205, 31: 0.303}
    others = dict.fromkeys(set(range(32)) - set(figure), (32 - sum(figure.values())) / 25)
    shares = shares_of(figure | others, mrr=0.55, trr=0.60)
    assert {block: 1 - shares[block] for block in figure} == pytest.approx(removed, abs=1e-9)


def test_a_block_that_changes_its_input_more_keeps_more_and_the_cosine_says_the_opposite() -> None:
    layers, evidence = blocks_of(3), Evidence(similarity={0: 0.2, 1: 0.9, 2: 0.6})
    change = Importance(mrr=0.5).allocate(layers, 0.6, evidence)
    cosine = Importance(0.5, "cosine").allocate(layers, 0.6, evidence)
    first, second, third = (rank_of(change[layer.name]) for layer in layers)
    assert first > third > second
    first, second, third = (rank_of(cosine[layer.name]) for layer in layers)
    assert first < third < second


def test_without_an_mrr_it_is_a_twentieth_below_the_target() -> None:
    layers, evidence = blocks_of(4), Evidence(similarity={0: 0.9, 1: 0.2, 2: 0.6, 3: 0.8})
    own = Importance().allocate(layers, 0.6, evidence)
    assert own == Importance(mrr=0.55).allocate(layers, 0.6, evidence)
    assert own != Importance(mrr=0.3).allocate(layers, 0.6, evidence)
    small = Importance().allocate(layers, 0.08, evidence)  # 0.05 below it is next to nothing
    assert small == Importance(mrr=0.04).allocate(layers, 0.08, evidence)


@pytest.mark.parametrize("cosine", [1.0, 1 - 1e-12, 1 + 1e-15])
def test_blocks_that_change_nothing_but_for_rounding_are_refused(cosine: float) -> None:
    evidence = Evidence(similarity=dict.fromkeys(range(3), cosine))
    with pytest.raises(NumericsError, match=r"no more than rounding.*another --all") as refusal:
        Importance().allocate(blocks_of(3), 0.6, evidence)
    assert len(str(refusal.value).splitlines()) == 1
    assert Importance(importance="cosine").allocate(blocks_of(3), 0.6, evidence)


@settings(max_examples=60, deadline=None)
@given(
    measure=MEASURES,
    cosines=st.lists(st.floats(-1, 1), min_size=2, max_size=8),
    widths=st.lists(st.integers(20, 60), min_size=2, max_size=8),
    kept=st.floats(0.2, 0.95),
    part=st.floats(0.5, 1.0),
)
def test_no_block_keeps_less_than_mrr_whatever_the_cosines(
    measure: Measure, cosines: list[float], widths: list[int], kept: float, part: float
) -> None:
    """But for the part of a component by which a rank is floored."""
    count = min(len(cosines), len(widths))
    similarity = dict(enumerate(cosines[:count]))
    layers = [LayerRef(f"h.{b}.fc", b, widths[b], 50, "x") for b in range(count)]
    allocator, evidence = Importance(kept * part, measure), Evidence(similarity=similarity)
    allocator.check(layers, kept)
    mean = sum(of_importances(measure, list(similarity.values()))) / count
    if mean <= (0 if measure == "cosine" else 1e-9):
        with pytest.raises(NumericsError, match="choose another --allocate") as refusal:
            allocator.allocate(layers, kept, evidence)
        assert len(str(refusal.value).splitlines()) == 1
        return
    shares = allocator.allocate(layers, kept, evidence)
    for layer in layers:
        assert shares[layer.name].cost(layer) > kept * part * layer.dense_cost - layer.atom_cost


def test_all_linears_of_a_block_keep_the_same_share() -> None:
    layers = blocks_of(3, ("q_proj", "o_proj"))
    shares = Importance().allocate(layers, 0.5, Evidence(similarity={0: 0.1, 1: 0.9, 2: 0.5}))
    ranks = [shares[layer.name].rank or 0 for layer in layers]
    assert all(abs(ranks[i] - ranks[i + 1]) <= 1 for i in (0, 2, 4))
    assert ranks[0] > ranks[4] > ranks[2]


def test_an_mrr_above_the_budget_is_refused() -> None:
    layers = blocks_of(2)
    with pytest.raises(ConfigError, match=r"mrr=0\.7 is above kept=0\.6.*smaller mrr") as refusal:
        Importance(mrr=0.7).check(layers, 0.6)
    assert len(str(refusal.value).splitlines()) == 1
    Importance(mrr=0.6).check(layers, 0.6)
    with pytest.raises(BudgetError, match=r"kept of at least 0\.0334"):
        Importance(mrr=0.01).check(layers, 0.02)


@settings(max_examples=100, deadline=None)
@given(
    losses=st.lists(st.integers(0, 10_000), min_size=1, max_size=8),
    kept=st.floats(0.5, 0.8),
    tokens=st.integers(1, 10_000),
)
def test_by_type_is_the_papers_formula(losses: list[int], kept: float, tokens: int) -> None:
    """L is the root of the squared output error of all tokens at the uniform rank."""
    layers = blocks_of(len(losses))
    uniform = affordable(kept, SIZE**2) // ATOM
    curves = {}
    for layer, loss in zip(layers, losses, strict=True):
        curves[layer.name] = torch.full((layer.paying_rank + 1,), 7e7, dtype=torch.float64)
        curves[layer.name][uniform] = loss**2 / tokens  # and nothing else is looked at
    shares = ByType().allocate(layers, kept, Evidence(losses=curves, tokens=tokens))
    formula = literal.by_type(losses, kept)
    budget = affordable(kept, len(layers) * SIZE**2)
    if min(formula) > 0.05 and max(formula) < 1 - ATOM / SIZE**2:  # no clipping
        wanted = dict(zip([layer.name for layer in layers], formula, strict=True))
        assert_whole_ranks_of(shares, wanted, budget)
    ranks = [rank_of(shares[layer.name]) for layer in layers]
    for one, rank in zip(losses, ranks, strict=True):
        for other, less in zip(losses, ranks, strict=True):
            assert one <= other or rank >= less  # a larger loss never keeps less


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, kept=st.floats(0.4, 0.8))
def test_each_type_bears_its_own_removal(seed: int, kept: float) -> None:
    """What is taken from one type is its part of the whole, but for whole ranks."""
    few = blocks_of(2, ("rare_proj",))
    layers = [*blocks_of(5, ("q_proj", "up_proj")), *few]
    shares = ByType().allocate(layers, kept, evidence_for(ByType(), layers, kept, seed))
    for kind in ("q_proj", "up_proj", "rare_proj"):
        of_type = [layer for layer in layers if layer.name.endswith(kind)]
        cost = sum(shares[layer.name].cost(layer) for layer in of_type)
        assert abs(cost - kept * len(of_type) * SIZE**2) <= len(of_type) * ATOM


def test_a_type_is_the_name_without_its_block() -> None:
    assert type_of(LayerRef("model.layers.12.mlp.fc1", 12, 4, 4, "x")) == "model.layers.*.mlp.fc1"
    stack = "h.2.attn.c_attn + h.3.attn.c_attn"
    assert type_of(LayerRef(stack, 2, 8, 4, "x")) == "h.*.attn.c_attn"
