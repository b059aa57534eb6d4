"""Kept columns: never dearer, never worse, exactly the published error, and refitted optimally."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.decompose import LowRank, energies, project
from compress_core.errors import ConfigError
from compress_core.fit import Moments
from compress_core.metric import SecondMoment
from compress_core.refine.columns import PreserveColumns, Search, _golden, index_cost
from tests import literal
from tests.made_up import SEEDS, weight_and_inputs

TOKENS = 120
SHAPES = st.tuples(st.integers(6, 24), st.integers(6, 24))
SEARCHES = st.sampled_from(["golden", "grid"])


def case(shape: tuple[int, int], loud: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight of little rank but for ``loud`` columns that have nothing to do with the rest."""
    weight, inputs, _ = weight_and_inputs(shape, TOKENS, seed)
    weight = literal.truncate(weight, 3) + 0.1 * weight
    extra, _, _ = weight_and_inputs(shape, 1, seed + 1)
    weight[:, :loud] = 4 * extra[:, :loud]
    return weight, inputs


def truncated(weight: Tensor, inputs: Tensor, rank: int) -> LowRank:
    u, v, _ = project(weight, SecondMoment(inputs.T @ inputs / len(inputs)), rank)
    return LowRank(u, v)


def refined(refiner: PreserveColumns, weight: Tensor, inputs: Tensor, rank: int) -> LowRank:
    moments = Moments(dense=inputs.T @ inputs / len(inputs))
    return refiner.fit(weight, truncated(weight, inputs, rank), moments)


def error_of(low: LowRank, weight: Tensor, inputs: Tensor) -> float:
    return float(((inputs @ (low.dense() - weight).T) ** 2).sum().sqrt())


def columns_for(traded: int, rank: int, shape: tuple[int, int]) -> int:
    """Columns at equal storage when ``traded`` ranks are traded and an index counts as a number."""
    m, n = shape
    return traded * (m + n) // (m + 1 - (rank - traded))


@settings(max_examples=50, deadline=None)
@given(
    shape=SHAPES,
    rank=st.integers(1, 11),
    loud=st.integers(0, 3),
    refit=st.booleans(),
    search=SEARCHES,
    seed=SEEDS,
)
def test_it_costs_no_more_and_is_no_worse_than_plain_truncation(
    shape: tuple[int, int], rank: int, loud: int, refit: bool, search: Search, seed: int
) -> None:
    m, n = shape
    rank = min(rank, (m * n - 1) // (m + n))
    weight, inputs = case(shape, loud, seed)
    plain = truncated(weight, inputs, rank)
    low = refined(PreserveColumns(refit=refit, search=search), weight, inputs, rank)
    numbers = low.u.numel() + low.v.numel()
    if low.columns is None or low.index is None:
        assert torch.equal(low.u, plain.u) and torch.equal(low.v, plain.v)
    else:
        count = len(low.index)
        assert low.columns.shape == (m, count) and count > 0
        assert low.v.shape == (low.rank, n - count) and low.rank >= 1
        assert (low.index.diff() > 0).all()
        numbers += low.columns.numel() + count * index_cost(n)
        assert error_of(low, weight, inputs) <= 0.99 * error_of(plain, weight, inputs) + 1e-9
    assert numbers <= rank * (m + n)


@settings(max_examples=50, deadline=None)
@given(shape=SHAPES, rank=st.integers(2, 11), loud=st.integers(0, 3), search=SEARCHES, seed=SEEDS)
def test_columns_and_error_are_the_published_ones(
    shape: tuple[int, int], rank: int, loud: int, search: Search, seed: int
) -> None:
    """The order by ‖E_:j‖² H_jj, the count at equal storage, Error(Δ) by Cholesky of the rest."""
    rank = min(rank, (shape[0] * shape[1] - 1) // sum(shape))
    weight, inputs = case(shape, loud, seed)
    plain = error_of(truncated(weight, inputs, rank), weight, inputs)
    order = literal.duo_svd_order(weight, inputs, rank)

    def error_at(traded: int) -> float:
        count = columns_for(traded, rank, shape)
        rest = order[count:].sort().values
        if len(rest) < rank - traded:
            return math.inf
        return literal.duo_svd_error(weight, inputs, rest, rank - traded)

    assert error_at(0) == pytest.approx(plain, rel=1e-6)
    low = refined(PreserveColumns(search=search), weight, inputs, rank)
    probes = [min(rank - 1, max(1, round(part * rank))) for part in (0.382, 0.618 * 0.382**2)]
    at_probes = min(error_at(traded) for traded in probes)
    if low.index is None:
        assert at_probes >= 0.99 * plain * (1 - 1e-9)
        return
    traded = rank - low.rank
    assert low.columns is not None
    assert len(low.index) == columns_for(traded, rank, shape)
    assert set(low.index.tolist()) == set(order[: len(low.index)].tolist())
    assert torch.equal(low.columns, weight[:, low.index])
    found = error_of(low, weight, inputs)
    assert found == pytest.approx(error_at(traded), rel=1e-6, abs=1e-6 * plain)
    if search == "golden":  # the best of all that was tried, so no worse than the two probes
        assert found <= at_probes * (1 + 1e-6) + 1e-9


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, rank=st.integers(2, 8), loud=st.integers(0, 3), seed=SEEDS)
def test_a_grid_finds_the_best_trade_of_a_few(
    shape: tuple[int, int], rank: int, loud: int, seed: int
) -> None:
    """Of up to eight ranks it tries every Δ."""
    rank = min(rank, (shape[0] * shape[1] - 1) // sum(shape))
    weight, inputs = case(shape, loud, seed)
    order = literal.duo_svd_order(weight, inputs, rank)
    errors = []
    for traded in range(rank):
        rest = order[columns_for(traded, rank, shape) :].sort().values
        if len(rest) >= rank - traded:
            errors.append(literal.duo_svd_error(weight, inputs, rest, rank - traded))
    low = refined(PreserveColumns(search="grid", accept=0.0), weight, inputs, rank)
    found = error_of(low, weight, inputs)
    assert found == pytest.approx(min(errors), rel=1e-6, abs=1e-6 * errors[0])


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, rank=st.integers(2, 11), loud=st.integers(1, 3), seed=SEEDS)
def test_refitted_columns_are_the_least_squares_fit_and_better_than_kept_ones(
    shape: tuple[int, int], rank: int, loud: int, seed: int
) -> None:
    rank = min(rank, (shape[0] * shape[1] - 1) // sum(shape))
    weight, inputs = case(shape, loud, seed)
    low = refined(PreserveColumns(refit=True), weight, inputs, rank)
    assume(low.index is not None)
    assert low.columns is not None and low.index is not None
    kept = low.index.tolist()
    rest = [i for i in range(shape[1]) if i not in kept]
    wanted = inputs @ weight.T - inputs[:, rest] @ (low.u @ low.v).T
    expected = torch.linalg.lstsq(inputs[:, kept], wanted).solution.T
    torch.testing.assert_close(low.columns, expected, rtol=1e-6, atol=1e-6)

    gram = inputs.T @ inputs / TOKENS  # the same columns as they were, with the best factors
    u, v, _ = project(weight[:, rest], SecondMoment(gram[rest][:, rest]), low.rank)
    unfitted = error_of(LowRank(u, v, weight[:, kept], low.index), weight, inputs)
    best = error_of(low, weight, inputs)
    assert best <= unfitted * (1 + 1e-9)

    # What the kept inputs cannot explain of the rest; its best truncation is a lower bound.
    kept_inputs = inputs[:, kept]
    part = inputs[:, rest] - kept_inputs @ torch.linalg.lstsq(kept_inputs, inputs[:, rest]).solution
    bound = energies(weight[:, rest], SecondMoment(part.T @ part))[low.rank :].sum().sqrt()
    assert best == pytest.approx(float(bound), rel=1e-6, abs=1e-6 * unfitted)


def planted(rank: int, loud: list[int]) -> tuple[Tensor, Tensor]:
    """A weight of that rank but for the loud columns and a little noise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight = 5 * normal(30, rank) @ normal(rank, 40) + 1e-3 * normal(30, 40)
    weight[:, loud] += 5 * normal(30, len(loud))
    return weight, normal(200, 40)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_a_small_rank_is_probed_at_one_traded_component(rank: int) -> None:
    """A tenth of five ranks is none; the published code then tries one."""
    tried = []

    def error(given: int) -> float:
        tried.append(given)
        return {0: 1.0, 1: 0.5}.get(given, 2.0)

    _golden(error, rank)
    assert 1 in tried and max(tried) < rank


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(6, 400))
def test_both_probes_are_the_published_ones_from_six_components_on(rank: int) -> None:
    """Below six the smaller one would be no trade at all."""
    tried = []

    def error(given: int) -> float:
        tried.append(given)
        return float(given > 0)

    _golden(error, rank)
    assert tried == [0, round(0.381966 * rank), round(0.0901699 * rank)]


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("search", ["golden", "grid"])
def test_planted_columns_are_found(refit: bool, search: Search) -> None:
    """Rank 4 cannot have both the rank and the columns; rank 2 beside the columns has."""
    loud = [3, 11, 20, 33]
    weight, inputs = planted(2, loud)
    plain = error_of(truncated(weight, inputs, 4), weight, inputs)
    low = refined(PreserveColumns(refit=refit, search=search), weight, inputs, 4)
    assert low.index is not None and low.rank == 2
    assert set(loud) <= set(low.index.tolist())
    assert error_of(low, weight, inputs) < 0.01 * plain


def test_a_grid_reaches_the_last_component() -> None:
    """Eight of nine ranks pay for eighteen columns, and seven would not."""
    weight, inputs = planted(1, list(range(5, 23)))
    low = refined(PreserveColumns(search="grid"), weight, inputs, 9)
    assert low.index is not None and low.rank == 1
    assert low.index.tolist() == list(range(5, 23))


def test_the_gain_that_is_asked_for_decides() -> None:
    weight, inputs = planted(2, [3, 11, 20, 33])
    weight += 0.5 * weight_and_inputs((30, 40), 1, seed=5)[0]  # so that the gain is a middling one
    plain = truncated(weight, inputs, 4)
    low = refined(PreserveColumns(), weight, inputs, 4)
    assert low.index is not None
    before, after = (error_of(x, weight, inputs) for x in (plain, low))
    gain = 1 - after / before
    assert 0.1 < gain < 0.9
    assert refined(PreserveColumns(accept=gain * 0.999), weight, inputs, 4).index is not None
    assert refined(PreserveColumns(accept=gain * 1.001), weight, inputs, 4).index is None


def test_a_weight_of_that_rank_is_left_alone() -> None:
    weight, inputs = case((12, 16), 0, seed=2)
    exact = literal.truncate(weight, 3)
    assert refined(PreserveColumns(), exact, inputs, 3).index is None


def test_dense_puts_columns_back_in_their_places() -> None:
    u = torch.tensor([[1.0], [2.0]])
    v = torch.tensor([[10.0, 20.0]])
    columns = torch.tensor([[7.0, 8.0], [9.0, 6.0]])
    low = LowRank(u, v, columns, torch.tensor([0, 2]))
    assert low.dense().tolist() == [[7.0, 10.0, 8.0, 20.0], [9.0, 20.0, 6.0, 40.0]]
    assert LowRank(u, v).dense().tolist() == [[10.0, 20.0], [20.0, 40.0]]


def test_an_index_counts_as_many_numbers_as_it_takes() -> None:
    assert [index_cost(features) for features in (1, 32767, 32768)] == [1, 1, 2]


@pytest.mark.parametrize("accept", [-0.01, 1.0, float("nan")])
def test_a_gain_that_cannot_be_is_refused(accept: float) -> None:
    with pytest.raises(ConfigError, match=r"^accept, a relative gain in error, is in \[0, 1\)"):
        PreserveColumns(accept=accept)
