"""SAES-SVD's truncation: the literal formula without its root, and optimal at its β."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError
from compress_core.fit import Moments
from compress_core.refine.cross_truncation import CrossTruncate
from tests import literal
from tests.made_up import SEEDS, weight_and_inputs

TOKENS = 160
SHAPES = st.tuples(st.integers(3, 20), st.integers(3, 20))
ALPHA = st.floats(0, 3)


def moments_of(dense: Tensor, behind: Tensor) -> Moments:
    return Moments(prefix=behind.T @ behind / len(behind), cross=dense.T @ behind / len(behind))


def of_rank(rank: int, shape: tuple[int, int]) -> LowRank:
    """Factors of which only the rank is looked at."""
    return LowRank(torch.zeros(shape[0], rank), torch.zeros(rank, shape[1]))


def refined(
    refiner: CrossTruncate, weight: Tensor, dense: Tensor, behind: Tensor, rank: int
) -> LowRank:
    moments = moments_of(dense, behind)
    low = refiner.fit(weight, of_rank(rank, (weight.shape[0], weight.shape[1])), moments)
    assert low.u.shape == (weight.shape[0], rank)
    assert low.v.shape == (rank, weight.shape[1])
    return low


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 8), seed=SEEDS)
def test_without_an_earlier_error_it_is_svd_llm(
    shape: tuple[int, int], rank: int, seed: int
) -> None:
    weight, dense, _ = weight_and_inputs(shape, TOKENS, seed)
    rank = min(rank, *shape)
    low = refined(CrossTruncate(), weight, dense, dense, rank)
    expected = literal.svd_llm(weight, dense, rank)
    torch.testing.assert_close(low.dense(), expected, rtol=0, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 8), alpha=ALPHA, seed=SEEDS)
def test_at_a_given_alpha_it_is_the_papers_formula(
    shape: tuple[int, int], rank: int, alpha: float, seed: int
) -> None:
    weight, dense, behind = weight_and_inputs(shape, TOKENS, seed)
    rank = min(rank, *shape)
    low = refined(CrossTruncate(alpha, alpha), weight, dense, behind, rank)
    moments = moments_of(dense, behind)
    assert moments.prefix is not None and moments.cross is not None
    expected = literal.saes_svd(weight, moments.prefix, moments.cross, rank, alpha)
    torch.testing.assert_close(low.dense(), expected, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    rank=st.integers(1, 8),
    alphas=st.sampled_from([(0.25, 0.75), (0.0, 100.0), (0.0, 0.1), (2.0, 5.0)]),
    seed=SEEDS,
)
def test_alpha_is_the_best_of_those_allowed_by_the_papers_criterion(
    shape: tuple[int, int], rank: int, alphas: tuple[float, float], seed: int
) -> None:
    """ACES in closed form against trying 20001 values; the truncation shows which α it took."""
    weight, dense, behind = weight_and_inputs(shape, TOKENS, seed)
    rank = min(rank, min(shape) - 1)
    moments = moments_of(dense, behind)
    assert moments.prefix is not None and moments.cross is not None
    alpha = literal.aces(weight, moments.prefix, moments.cross, rank, alphas)
    assert alphas[0] - 1e-9 <= alpha <= alphas[1] + 1e-6
    own = refined(CrossTruncate(*alphas), weight, dense, behind, rank).dense()
    at_alpha, *at_ends = (
        refined(CrossTruncate(a, a), weight, dense, behind, rank).dense() for a in (alpha, *alphas)
    )
    apart = float((at_ends[0] - at_ends[1]).norm())
    assert float((own - at_alpha).norm()) <= 1e-3 * apart + 1e-6


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 6), alpha=st.floats(0.05, 3), seed=SEEDS)
def test_no_matrix_of_that_rank_is_better(
    shape: tuple[int, int], rank: int, alpha: float, seed: int
) -> None:
    """‖u v X − W X‖² + α ‖u v X − W X_dense‖², near the solution and away from it."""
    weight, dense, behind = weight_and_inputs(shape, TOKENS, seed)
    low = refined(CrossTruncate(alpha, alpha), weight, dense, behind, min(rank, *shape))

    def objective(u: Tensor, v: Tensor) -> float:
        outputs = behind @ (u @ v).T
        own, other = outputs - behind @ weight.T, outputs - dense @ weight.T
        return float((own**2).sum() + alpha * (other**2).sum())

    best = objective(low.u, low.v)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-6, 1e-4, 1e-2, 1e-1, 1.0):
        for _ in range(4):
            u, v = (
                x + size * torch.randn(x.shape, generator=generator, dtype=torch.float64)
                for x in (low.u, low.v)
            )
            assert objective(u, v) >= best * (1 - 1e-12)
    for own in (behind, dense):  # the truncations for either half of the objective
        other = literal.svd_llm(weight, own, min(rank, *shape))
        assert objective(other, torch.eye(shape[1], dtype=torch.float64)) >= best * (1 - 1e-12)


def test_fewer_tokens_than_inputs_are_no_matter() -> None:
    weight, dense, behind = weight_and_inputs((10, 16), 7, seed=4)
    low = refined(CrossTruncate(), weight, dense, behind, 5)
    assert low.u.isfinite().all() and low.v.isfinite().all()
    error = behind @ (low.dense() - weight).T
    assert float((error**2).sum()) < float(((behind @ weight.T) ** 2).sum())


@pytest.mark.parametrize(
    ("least", "most"), [(-0.1, 0.5), (0.5, 0.4), (float("nan"), 1), (0.25, float("inf"))]
)
def test_weights_that_cannot_be_are_refused(least: float, most: float) -> None:
    with pytest.raises(ConfigError, match=r"^alpha needs 0 <= alpha_least <= alpha_most, got"):
        CrossTruncate(least, most)
