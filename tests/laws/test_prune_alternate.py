"""Sparse plus low rank: what each turn and each part must never make worse."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.errors import ConfigError
from compress_core.fit import Moments
from compress_core.methods import build_method
from compress_core.prune.adapter import Adapter
from compress_core.prune.alternate import HassleFree, Oats, truncate
from compress_core.prune.obs import SparseGPT, damped
from compress_core.prune.wanda import Wanda
from compress_core.types import Share
from tests.made_up import SEEDS, weight_and_inputs

SIDES = st.integers(4, 14)
RANKS = st.integers(0, 3)
PARTS = st.floats(0.1, 0.9)


def made(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    weight, dense, _ = weight_and_inputs((rows, columns), 4 * columns, seed)
    return weight, dense.T @ dense / len(dense)


@given(SIDES, SIDES, SEEDS, st.integers(0, 4))
def test_truncation_by_the_smaller_gram_is_that_by_svd(
    rows: int, columns: int, seed: int, rank: int
) -> None:
    weight, _ = made(rows, columns, seed)
    u, v = truncate(weight, rank)
    assert u.shape == (rows, rank) and v.shape == (rank, columns)
    s = torch.linalg.svdvals(weight)
    expected = float(s[rank:].square().sum())
    assert float((weight - u @ v).square().sum()) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(SIDES, SIDES, SEEDS, st.integers(1, 3), PARTS)
def test_oats_error_never_rises_from_turn_to_turn(
    rows: int, columns: int, seed: int, rank: int, part: float
) -> None:
    weight, _ = made(rows, columns, seed)
    errors: list[float] = []
    share = Share(rank, int(part * rows * columns))
    low = Oats(iterations=15).turns(weight, share, errors.append)
    assert len(errors) == 15
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in itertools.pairwise(errors))
    found = float((weight - low.dense()).square().sum())
    assert found == pytest.approx(errors[-1], rel=1e-6, abs=1e-9)
    assert low.sparse is not None and low.sparse.nonzeros == share.nonzeros


@given(SIDES, SIDES, SEEDS, PARTS)
def test_oats_without_factors_is_wanda(rows: int, columns: int, seed: int, part: float) -> None:
    weight, h = made(rows, columns, seed)
    share, moments = Share(0, int(part * rows * columns)), Moments(prefix=h)
    one, other = (p.fit(weight, share, moments) for p in (Oats(), Wanda()))
    assert one.sparse is not None and other.sparse is not None
    assert torch.equal(one.sparse.mask, other.sparse.mask)
    torch.testing.assert_close(one.dense(), other.dense())


def test_oats_finds_what_is_sparse_plus_low_rank_in_the_scale_of_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((40, 2), (2, 40)))
    weight = u @ v
    weight[torch.arange(40), (7 * torch.arange(40) + 3) % 40] += 8  # one in each row and column
    scale = torch.linspace(0.5, 2, 40, dtype=torch.float64)
    moments = Moments(prefix=torch.diag(scale.square()))
    low = Oats().fit(weight, Share(2, 120), moments)
    assert float((low.dense() - weight).norm() / weight.norm()) < 1e-6


@settings(deadline=None)
@given(SIDES, SIDES, SEEDS, RANKS, PARTS, st.sampled_from(["wanda", "sparsegpt"]))
def test_an_adapter_never_raises_the_error_in_the_scale_of_the_inputs(
    rows: int, columns: int, seed: int, rank: int, part: float, mask: str
) -> None:
    weight, h = made(rows, columns, seed)
    scale, moments = h.diagonal().sqrt(), Moments(prefix=h)
    share = Share(rank, int(part * rows * columns))
    pruner = Wanda() if mask == "wanda" else SparseGPT()
    without = pruner.fit(weight, Share(0, share.nonzeros), moments)
    low = Adapter(mask).fit(weight, share, moments)
    assert low.sparse is not None and without.sparse is not None
    assert torch.equal(low.sparse.dense(), without.sparse.dense())
    before, after = (float(((weight - x.dense()) * scale).square().sum()) for x in (without, low))
    s = torch.linalg.svdvals((weight - without.dense()) * scale)
    optimum = float(s[rank:].square().sum())
    assert after == pytest.approx(optimum, rel=1e-6, abs=1e-9)
    assert after <= before * (1 + 1e-9) + 1e-9


@settings(deadline=None)
@given(SIDES, SIDES, SEEDS, st.integers(1, 3), PARTS)
def test_hassle_free_error_falls_and_is_below_that_of_its_parts(
    rows: int, columns: int, seed: int, rank: int, part: float
) -> None:
    weight, h = made(rows, columns, seed)
    h, errors = damped(h, 0.005, 0.005), list[float]()
    share = Share(rank, int(part * rows * columns))
    low = HassleFree(iterations=6).turns(weight, share, h, errors.append)
    assert len(errors) == 6 and errors == sorted(errors, reverse=True)
    rest = weight - low.dense()
    assert float((rest @ h * rest).sum()) == pytest.approx(errors[-1], rel=1e-6, abs=1e-9)
    assert low.sparse is not None
    assert (low.rank, low.sparse.nonzeros) == (min(rank, rows, columns), share.nonzeros)
    alone = HassleFree().fit(weight, Share(0, share.nonzeros), Moments(prefix=h))
    rest = weight - alone.dense()
    assert errors[0] <= float((rest @ h * rest).sum()) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("method", ["oats", "slim", "hassle_free", "slim:mask=sparsegpt"])
def test_inputs_that_are_always_zero_and_an_empty_rank_are_ordinary(method: str) -> None:
    weight, h = made(10, 12, 3)
    h[[2, 7]] = 0
    h[:, [2, 7]] = 0
    pruner = build_method(method).fit
    assert pruner is not None
    for share in (Share(0, 50), Share(2, 40), Share(1, 1), Share(2, 120)):
        low = pruner.fit(weight, share, Moments(prefix=h))
        assert bool(low.dense().isfinite().all())
        assert low.sparse is not None
        assert (low.rank, low.sparse.nonzeros) == (share.rank, share.nonzeros)


@pytest.mark.parametrize("method", ["oats", "slim", "hassle_free"])
def test_the_sparse_part_keeps_n_of_every_m(method: str) -> None:
    weight, h = made(10, 12, 4)
    pruner = build_method(f"{method}:pattern=2:4").fit
    assert pruner is not None
    low = pruner.fit(weight, Share(2, 60), Moments(prefix=h))
    assert low.sparse is not None
    assert bool((low.sparse.mask.view(10, 3, 4).sum(dim=2) == 2).all())


def test_no_turns_are_refused() -> None:
    for kind in (Oats, HassleFree):
        with pytest.raises(ConfigError, match="iterations must be at least 1, got 0"):
            kind(iterations=0)
    with pytest.raises(ConfigError, match="own_damping is 0 or more, got -1"):
        HassleFree(own_damping=-1)
