"""Alternating least squares: the papers' updates in covariance form, and what they cannot do."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.decompose import LowRank, project
from compress_core.errors import ConfigError
from compress_core.fit import Moments, Prefix
from compress_core.metric import Plain, SecondMoment
from compress_core.refine.least_squares import Alternate, update_in, update_out
from tests import literal
from tests.made_up import SEEDS, weight_and_inputs

TOKENS = 160
SHAPES = st.tuples(st.integers(3, 20), st.integers(3, 20))


def moments_of(dense: Tensor, behind: Tensor) -> Moments:
    return Moments(prefix=behind.T @ behind / len(behind), cross=dense.T @ behind / len(behind))


def truncated(weight: Tensor, inputs: Tensor | None, rank: int) -> LowRank:
    """SVD-LLM's factors for the inputs; plain SVD's without them."""
    metric = Plain() if inputs is None else SecondMoment(inputs.T @ inputs / len(inputs))
    u, v, _ = project(weight, metric, rank)
    return LowRank(u, v)


def loss_of(factors: LowRank, inputs: Tensor, outputs: Tensor) -> float:
    return float(((inputs @ factors.dense().T - outputs) ** 2).sum())


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 8), sweeps=st.integers(0, 4), seed=SEEDS)
def test_with_the_inputs_of_the_truncation_itself_nothing_changes(
    shape: tuple[int, int], rank: int, sweeps: int, seed: int
) -> None:
    """AdaSVD's updates gain only where their inputs are other ones than the truncation's."""
    weight, inputs, _ = weight_and_inputs(shape, TOKENS, seed)
    factors = truncated(weight, inputs, min(rank, *shape))
    for toward_dense in (0.0, 1.0):
        refiner = Alternate(sweeps, toward_dense)
        refined = refiner.fit(weight, factors, moments_of(inputs, inputs))
        torch.testing.assert_close(refined.dense(), factors.dense(), rtol=0, atol=1e-8)
        before, after = (loss_of(x, inputs, inputs @ weight.T) for x in (factors, refined))
        assert after == pytest.approx(before, rel=1e-10, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 4), seed=SEEDS)
def test_from_plain_svd_every_sweep_comes_nearer_to_svd_llm(
    shape: tuple[int, int], rank: int, seed: int
) -> None:
    weight, inputs, _ = weight_and_inputs(shape, TOKENS, seed)
    rank = min(rank, min(shape) - 1)
    outputs, moments = inputs @ weight.T, moments_of(inputs, inputs)
    best = loss_of(truncated(weight, inputs, rank), inputs, outputs)
    factors = truncated(weight, None, rank)
    losses = [loss_of(factors, inputs, outputs)]
    for _ in range(12):
        factors = Alternate(1).fit(weight, factors, moments)
        losses.append(loss_of(factors, inputs, outputs))
        assert best * (1 - 1e-9) <= losses[-1] <= losses[-2] * (1 + 1e-9)
    assert losses[-1] - best <= 0.7 * (losses[0] - best) + 1e-9 * best


def test_many_sweeps_from_plain_svd_reach_svd_llm() -> None:
    weight, inputs, _ = weight_and_inputs((12, 18), TOKENS, seed=0)
    refined = Alternate(500).fit(weight, truncated(weight, None, 4), moments_of(inputs, inputs))
    torch.testing.assert_close(
        refined.dense(), literal.svd_llm(weight, inputs, 4), rtol=0, atol=1e-6
    )


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 8), sweeps=st.integers(1, 3), seed=SEEDS)
def test_it_is_the_papers_update_by_pseudo_inverses_of_the_inputs(
    shape: tuple[int, int], rank: int, sweeps: int, seed: int
) -> None:
    weight, dense, behind = weight_and_inputs(shape, TOKENS, seed)
    factors = truncated(weight, dense, min(rank, *shape))
    refined = Alternate(sweeps).fit(weight, factors, moments_of(dense, behind))
    u, v = factors.u, factors.v
    for _ in range(sweeps):
        u, v = literal.ada_svd(weight, u, v, behind, behind @ weight.T)
    torch.testing.assert_close(refined.u, u, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(refined.v, v, rtol=1e-7, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 8), toward_dense=st.floats(0, 1), seed=SEEDS)
def test_without_sweeps_u_alone_is_the_least_squares_fit(
    shape: tuple[int, int], rank: int, toward_dense: float, seed: int
) -> None:
    """To the layer's own outputs, the dense model's or the mix of both."""
    weight, dense, behind = weight_and_inputs(shape, TOKENS, seed)
    factors = truncated(weight, dense, min(rank, *shape))
    refined = Alternate(0, toward_dense).fit(weight, factors, moments_of(dense, behind))
    assert torch.equal(refined.v, factors.v)
    wanted = ((1 - toward_dense) * behind + toward_dense * dense) @ weight.T
    expected = torch.linalg.lstsq(behind @ factors.v.T, wanted).solution.T
    torch.testing.assert_close(refined.u, expected, rtol=1e-7, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 8), toward_dense=st.floats(0, 1), seed=SEEDS)
def test_no_update_raises_the_distance_to_its_target(
    shape: tuple[int, int], rank: int, toward_dense: float, seed: int
) -> None:
    weight, dense, behind = weight_and_inputs(shape, TOKENS, seed)
    moments, gram = moments_of(dense, behind), behind.T @ behind / TOKENS
    assert moments.cross is not None
    target = (1 - toward_dense) * gram + toward_dense * moments.cross
    wanted = ((1 - toward_dense) * behind + toward_dense * dense) @ weight.T
    factors = truncated(weight, None, min(rank, *shape))
    slack = 1e-9 * float((wanted**2).sum())
    for _ in range(3):
        before = loss_of(factors, behind, wanted)
        u = update_out(weight, factors.v, target, gram)
        between = loss_of(LowRank(u, factors.v), behind, wanted)
        factors = LowRank(u, update_in(weight, u, target, gram))
        after = loss_of(factors, behind, wanted)
        assert after - slack <= between <= before + slack
    through = Alternate(3, toward_dense).fit(
        weight, truncated(weight, None, min(rank, *shape)), moments
    )
    assert loss_of(through, behind, wanted) == pytest.approx(after, rel=1e-6, abs=slack)


def test_toward_dense_gets_nearer_to_the_dense_models_outputs_than_its_own() -> None:
    weight, dense, behind = weight_and_inputs((16, 20), TOKENS, seed=3)
    factors, moments = truncated(weight, dense, 6), moments_of(dense, behind)
    own, toward = (Alternate(1, t).fit(weight, factors, moments) for t in (0.0, 1.0))
    wanted = dense @ weight.T
    assert loss_of(toward, behind, wanted) < 0.95 * loss_of(own, behind, wanted)
    assert loss_of(own, behind, behind @ weight.T) < loss_of(toward, behind, behind @ weight.T)


def test_dead_inputs_and_fewer_tokens_than_inputs_are_no_matter() -> None:
    weight, dense, behind = weight_and_inputs((10, 16), 7, seed=4)
    dense[:, :3] = behind[:, :3] = 0
    for sweeps, toward_dense in ((0, 0.0), (0, 1.0), (2, 0.0), (2, 1.0)):
        start = truncated(weight, dense, 5)
        moments = moments_of(dense, behind)
        refined = Alternate(sweeps, toward_dense).fit(weight, start, moments)
        assert refined.u.isfinite().all() and refined.v.isfinite().all()
        wanted = (dense if toward_dense else behind) @ weight.T
        assert loss_of(refined, behind, wanted) <= loss_of(start, behind, wanted) * (1 + 1e-6)


@pytest.mark.parametrize("toward_dense", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_mix_outside_its_range_is_refused(toward_dense: float) -> None:
    with pytest.raises(ConfigError, match=r"^toward_dense is in \[0, 1\], got [-\w.]+$"):
        Alternate(1, toward_dense)


def test_a_prefix_that_cannot_be_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^the prefix grows by 'layer' or by 'block', got 'row'$"
    ):
        Prefix("row")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^buckets must be 0 or more, got -1$"):
        dataclasses.replace(Prefix(), buckets=-1)
