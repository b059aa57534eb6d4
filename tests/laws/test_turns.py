"""Refits to the weight: turns never raise the error, counts stay, anchors are the weight itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError
from compress_core.fit import DENSE, Moments
from compress_core.refine.turns import Anchor, Refit, ScaledTurns, Turns, refit_to_weight
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
    """The first one may, which moves entries so that every row has as many."""
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
        before = before if isinstance(refit, Anchor) else math.inf
        assert after <= min(before, least.get(type(refit), before)) + 1e-9
        least[type(refit)] = after
        if not isinstance(refit, Anchor):
            rows = fitted.sparse.mask.sum(dim=1)
            assert int(rows.max() - rows.min()) <= 1


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
    places = torch.rand(40, 60, generator=generator).argsort(dim=1) < 3  # as many in each row
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


def test_what_each_name_reads() -> None:
    assert ScaledTurns.reads == {DENSE} and not Turns.reads and not Anchor.reads
    assert refit_to_weight("turns", scaled=True) == ScaledTurns()
    assert refit_to_weight("turns", scaled=False) == Turns()
    assert refit_to_weight("anchor", scaled=True) == Anchor()
    assert refit_to_weight("prefix", scaled=True) is None
    with pytest.raises(ConfigError, match="at least one turn, got 0"):
        Turns(0)
