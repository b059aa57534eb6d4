"""Wanda and SparseGPT against brute force and against what their papers prove."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError, NumericsError
from compress_core.fit import Moments
from compress_core.prune.obs import SparseGPT, damped, prune, remove, upper_factor
from compress_core.prune.select import best_of_all, read_pattern
from compress_core.prune.wanda import Wanda
from compress_core.types import Share
from tests.made_up import SEEDS, weight_and_inputs

SIDES = st.integers(2, 12)
PARTS = st.floats(0.05, 0.95)


def made(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and a second moment."""
    weight, dense, _ = weight_and_inputs((rows, columns), 4 * columns, seed)
    return weight, dense.T @ dense / len(dense)


def entries_of(low: LowRank) -> Tensor:
    assert low.sparse is not None and low.rank == 0
    return low.sparse.mask


def error(weight: Tensor, other: Tensor, h: Tensor) -> float:
    return float(((weight - other) @ h * (weight - other)).sum())


@given(st.integers(1, 4), st.integers(2, 6), SEEDS, PARTS)
def test_wanda_is_the_best_removal_from_each_row_where_inputs_do_not_correlate(
    rows: int, columns: int, seed: int, part: float
) -> None:
    weight, h = made(rows, columns, seed)
    diagonal, each = torch.diag(h.diagonal()), int(part * columns)
    low = Wanda().fit(weight, Share(0, rows * each), Moments(prefix=h))
    assert torch.equal(low.dense(), weight * entries_of(low))
    for row, found in zip(weight, low.dense(), strict=True):
        least = min(
            error(
                row[None], row[None] * torch.tensor([j in kept for j in range(columns)]), diagonal
            )
            for kept in itertools.combinations(range(columns), each)
        )
        assert error(row[None], found[None], diagonal) == pytest.approx(least, abs=1e-12)


@given(SIDES, SIDES, SEEDS, PARTS, st.integers(1, 5))
def test_the_sweep_keeps_exactly_what_it_is_told_to(
    rows: int, columns: int, seed: int, part: float, blocksize: int
) -> None:
    weight, h = made(rows, columns, seed)
    count = int(part * rows * columns)
    low = SparseGPT(blocksize=blocksize).fit(weight, Share(0, count), Moments(prefix=h))
    assert int(entries_of(low).sum()) == count
    blocks = entries_of(low).split(blocksize, dim=1)
    for block in blocks:  # the same share of each block of columns
        assert abs(int(block.sum()) - count * block.shape[1] / columns) < 1


@given(SIDES, st.integers(1, 4), SEEDS, st.sampled_from(["1:2", "2:4", "3:5"]), SIDES)
def test_the_sweep_keeps_n_of_every_m(
    rows: int, groups: int, seed: int, text: str, blocksize: int
) -> None:
    pattern = read_pattern(text)
    assert pattern is not None
    weight, h = made(rows, groups * pattern.of, seed)
    count = rows * groups * pattern.keep
    for pruner in (SparseGPT(blocksize=blocksize, pattern=text), Wanda(text)):
        mask = entries_of(pruner.fit(weight, Share(0, count), Moments(prefix=h)))
        grouped = mask.view(rows, groups, pattern.of)
        assert bool((grouped.sum(dim=2) == pattern.keep).all())


@given(SIDES, SIDES, SEEDS, PARTS, st.integers(1, 12))
def test_without_correlation_sparsegpt_removes_the_least_squares_and_changes_nothing(
    rows: int, columns: int, seed: int, part: float, blocksize: int
) -> None:
    weight, h = made(rows, columns, seed)
    h, count = torch.diag(h.diagonal()), int(part * rows * columns)
    triangle = upper_factor(h, 0)
    sparse = remove(weight, triangle, count, None, columns)
    saliency = weight.square() / torch.linalg.inv(h).diagonal()
    assert torch.equal(sparse.mask, best_of_all(saliency, count))
    sparse = remove(weight, triangle, count, None, blocksize)
    torch.testing.assert_close(sparse.dense(), weight * sparse.mask)


def brute_force(weight: Tensor, h: Tensor, mask: Tensor) -> Tensor:
    """Columns removed one by one, each with the optimal update of those behind it, by inverses."""
    w = weight.clone()
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        step = w[:, j] / inverse[0, 0]
        w[:, j:] -= torch.where(mask[:, j], 0.0, step)[:, None] * inverse[0]
    return w


@pytest.mark.parametrize("blocksize", [1, 2, 4, 6, 128])
@pytest.mark.parametrize("seed", range(5))
def test_the_sweep_is_optimal_brain_surgery(blocksize: int, seed: int) -> None:
    weight, h = made(6, 6, seed)
    triangle = upper_factor(h, 0)
    torch.testing.assert_close(triangle @ triangle.T, h)
    assert torch.equal(triangle, triangle.triu())
    sparse = remove(weight, triangle, 18, None, blocksize)
    expected = brute_force(weight, h, sparse.mask)
    torch.testing.assert_close(sparse.dense(), expected, atol=1e-10, rtol=1e-9)


@given(SIDES, SIDES, SEEDS, PARTS)
def test_for_its_mask_the_sweep_lies_between_leaving_the_rest_alone_and_fitting_it(
    rows: int, columns: int, seed: int, part: float
) -> None:
    """Of one row with one removal it is the optimum; in general no better than least squares."""
    weight, h = made(rows, columns, seed)
    triangle, count = upper_factor(h, 0), int(part * rows * columns)
    sparse = remove(weight, triangle, count, None, 128)
    best = torch.zeros_like(weight)
    for row, mask, target in zip(best, sparse.mask, weight @ h, strict=True):
        row[mask] = torch.linalg.solve(h[mask][:, mask], target[mask])
    assert error(weight, sparse.dense(), h) >= error(weight, best, h) * (1 - 1e-6)
    first = torch.ones_like(weight, dtype=torch.bool)
    first[:, 0] = False
    choice = lambda scores, at: first[:, at : at + scores.shape[1]]  # noqa: E731
    removed = weight - prune(weight, triangle, [choice], 4, 4).errors[:, 0].T
    wanted = torch.zeros_like(weight)
    wanted[:, 1:] = torch.linalg.solve(h[1:, 1:], (weight @ h)[:, 1:], left=False)
    torch.testing.assert_close(removed, wanted, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("part", [0.3, 0.5, 0.7])
def test_sparsegpt_has_less_error_than_wanda_and_wanda_than_magnitudes(
    seed: int, part: float
) -> None:
    weight, h = made(24, 32, seed)
    share, moments = Share(0, int(part * weight.numel())), Moments(prefix=h)
    magnitude = weight * best_of_all(weight.abs(), share.nonzeros)
    surgery = SparseGPT().fit(weight, share, moments).dense()
    wanda = Wanda().fit(weight, share, moments).dense()
    errors = [error(weight, found, h) for found in (surgery, wanda, magnitude)]
    assert errors == sorted(errors)


def test_inputs_that_are_always_zero_are_removed_first_and_nothing_breaks() -> None:
    weight, h = made(6, 8, 0)
    dead = [1, 5]
    h[dead] = 0
    h[:, dead] = 0
    for pruner in (SparseGPT(), Wanda()):
        low = pruner.fit(weight, Share(0, 30), Moments(prefix=h))
        assert not bool(entries_of(low)[:, dead].any())
        assert bool(low.dense().isfinite().all())
    everything = SparseGPT().fit(weight, Share(0, 48), Moments(prefix=h)).dense()
    torch.testing.assert_close(everything, weight * (h.diagonal() > 0))


def test_damping_adds_parts_of_the_diagonal_and_one_where_it_is_zero() -> None:
    gram = torch.diag(torch.tensor([4.0, 0.0, 2.0], dtype=torch.float64))
    found = damped(gram, 0.1, 0.5).diagonal()
    torch.testing.assert_close(found, torch.tensor([6.3, 1.0, 3.3], dtype=torch.float64))
    assert torch.equal(damped(torch.zeros(2, 2), 0.1), torch.eye(2))


def test_a_second_moment_that_cannot_be_one_is_refused_in_one_line() -> None:
    weight, h = made(4, 6, 0)
    singular = torch.ones(6, 6, dtype=torch.float64)
    share = Share(0, 12)
    with pytest.raises(NumericsError, match=r"\(6, 6\) of the inputs is not positive definite at "):
        SparseGPT(damping=0).fit(weight, share, Moments(prefix=singular - 0.1 * torch.eye(6)))
    h[2, 3] = float("nan")
    for pruner in (SparseGPT(), Wanda()):
        with pytest.raises(NumericsError, match="is not finite or has a negative diagonal"):
            pruner.fit(weight, share, Moments(prefix=h))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="damping, a part of the mean of H, is 0 or more; got -1"):
        SparseGPT(damping=-1)
    with pytest.raises(ConfigError, match="blocksize must be at least 1, got 0"):
        SparseGPT(blocksize=0)
