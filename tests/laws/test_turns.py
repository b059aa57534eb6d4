"""Refits to the weight: never a larger error, the same counts, what is anchored is the weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError
from compress_core.fit import DENSE, Moments
from compress_core.prune.select import best_of_all
from compress_core.refine.turns import Anchor, Refit, ScaledTurns, Turns, largest, refit_to_weight
from compress_core.sparse import Sparse


def cut(rank: int, part: float, seed: int) -> tuple[Tensor, LowRank, Tensor]:
    """A weight, a cut of it that fits badly, and the inputs' second moment."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    mask = torch.rand(12, 20, generator=generator) < part
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    low = LowRank(u[:, :rank] * s[:rank], v[:rank], sparse=Sparse.of(0.5 * weight, mask))
    return weight, low, torch.diag(torch.rand(20, generator=generator, dtype=torch.float64))


@settings(max_examples=25)
@given(st.integers(0, 6), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 100))
def test_no_turn_makes_the_error_larger_and_counts_stay(rank: int, part: float, seed: int) -> None:
    weight, start, moment = cut(rank, part, seed)
    scale = moment.diagonal().sqrt()
    ones = torch.ones_like(scale)
    refits: list[tuple[Refit, Tensor]] = [
        (Anchor(), ones),
        *((Turns(turns), ones) for turns in (1, 2, 5)),
        *((ScaledTurns(turns), scale.clamp_min(1e-3 * scale.mean())) for turns in (1, 2, 5)),
    ]
    least: dict[type[Refit], float] = {}
    for refit, d in refits:
        fitted = refit.fit(weight, start, Moments(dense=moment))
        assert fitted.rank == rank and fitted.sparse is not None and start.sparse is not None
        assert fitted.sparse.nonzeros == start.sparse.nonzeros
        before, after = (float(((weight - x.dense()) * d).norm()) for x in (start, fitted))
        assert after <= min(before, least.get(type(refit), before)) + 1e-9
        least[type(refit)] = after


def test_an_anchored_weight_is_the_dense_one_where_entries_are() -> None:
    weight, start, _ = cut(3, 0.3, 0)
    fitted = Anchor().fit(weight, start, Moments())
    assert fitted.sparse is not None and start.sparse is not None
    assert torch.equal(fitted.sparse.mask, start.sparse.mask)
    assert fitted.dense()[start.sparse.mask] == pytest.approx(weight[start.sparse.mask])
    assert torch.equal(fitted.u, start.u) and torch.equal(fitted.v, start.v)


def test_a_planted_sum_is_found_from_a_bad_start() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(40, 2, generator=generator) @ torch.randn(2, 60, generator=generator)
    places = torch.rand(40, 60, generator=generator) < 0.05
    entries = torch.where(places, 10 * torch.randn(40, 60, generator=generator).sign(), 0.0)
    weight = (low + entries).double()
    wrong = torch.zeros_like(places).flatten()
    wrong[: int(places.sum())] = True
    zeros = LowRank(weight.new_zeros(40, 2), weight.new_zeros(2, 60))
    start = LowRank(zeros.u, zeros.v, sparse=Sparse.of(weight, wrong.view_as(places)))
    fitted = Turns(60).fit(weight, start, Moments())
    assert fitted.sparse is not None and torch.equal(fitted.sparse.mask, places)
    assert fitted.u @ fitted.v == pytest.approx(low.double(), abs=1e-3)


def test_factors_alone_stay_as_they_are() -> None:
    weight, start, _ = cut(3, 0.3, 0)
    bare = LowRank(start.u, start.v)
    for refit in (Anchor(), Turns()):
        assert refit.fit(weight, bare, Moments()) is bare


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(0, 6))
def test_the_largest_are_those_of_a_sort(values: list[int], count: int) -> None:
    scores = torch.tensor(values, dtype=torch.float64).view(2, 3)
    assert torch.equal(largest(scores, count), best_of_all(scores, count))


def test_what_each_name_reads() -> None:
    assert ScaledTurns.reads == {DENSE} and not Turns.reads and not Anchor.reads
    assert refit_to_weight("turns", scaled=True) == ScaledTurns()
    assert refit_to_weight("turns", scaled=False) == Turns()
    assert refit_to_weight("anchor", scaled=True) == Anchor()
    assert refit_to_weight("prefix", scaled=True) is None
    with pytest.raises(ConfigError, match="at least one turn, got 0"):
        Turns(0)
