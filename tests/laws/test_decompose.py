"""What the decomposition promises: the papers' optimum, its exact loss, and no fragile algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.decompose import ProjectOutputs
from compress_core.errors import NumericsError
from compress_core.methods import build_method
from compress_core.metric import Metric, OutputError, Plain
from compress_core.stats import InputAccumulator, InputStats
from compress_core.types import Share
from tests import literal
from tests.by_hand import first_rows

SHAPES = [(24, 40), (40, 24), (32, 32), (8, 64), (64, 8)]


def measured(inputs: Tensor) -> InputStats:
    accumulator = InputAccumulator(inputs.shape[1])
    accumulator.add(inputs[None])
    return accumulator.finish()


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mix


def weight_of(shape: tuple[int, int], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def product(weight: Tensor, metric: Metric, rank: int, of: int | None = None) -> Tensor:
    """The realised weight at ``rank``, from a decomposition that went to rank ``of``."""
    decomposer = ProjectOutputs()
    prepared = decomposer.prepare(weight, metric, of or rank)
    low = decomposer.realise(first_rows(prepared), Share(rank))
    return low.u.double() @ low.v.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["svd_llm", "asvd", "svd"])
def test_the_truncated_weight_is_the_papers(shape: tuple[int, int], method: str) -> None:
    weight, inputs = weight_of(shape), correlated(500, shape[1])
    metric = build_method(method).weighting.metric(measured(inputs))
    for rank in (1, 3, 7):
        expected = {
            "svd": lambda r: literal.truncate(weight, r),
            "asvd": lambda r: literal.asvd(weight, inputs, r),
            "svd_llm": lambda r: literal.svd_llm(weight, inputs, r),
        }[method](rank)
        torch.testing.assert_close(product(weight, metric, rank), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_curve_is_the_measured_output_error(shape: tuple[int, int]) -> None:
    weight, inputs = weight_of(shape), correlated(300, shape[1])
    metric = OutputError().metric(measured(inputs))
    loss = ProjectOutputs().prepare(weight, metric, 7).loss
    assert loss.shape == (8,)
    for rank in range(1, 8):
        error = weight - product(weight, metric, rank, of=7)
        assert float(((inputs @ error.T) ** 2).sum()) / 300 == pytest.approx(
            float(loss[rank]), rel=1e-5
        )
    assert float(((inputs @ weight.T) ** 2).sum()) / 300 == pytest.approx(float(loss[0]), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    out_features=st.integers(2, 24),
    in_features=st.integers(2, 24),
    tokens=st.integers(1, 40),
    dead=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_no_statistics_are_too_poor(
    out_features: int, in_features: int, tokens: int, dead: int, seed: int
) -> None:
    """Fewer tokens than features, dead channels: finite, orthonormal, exact once rank covers X."""
    weight, inputs = weight_of((out_features, in_features), seed), correlated(tokens, in_features)
    inputs[:, : min(dead, in_features - 1)] = 0
    most = min(out_features, in_features)
    prepared = ProjectOutputs().prepare(weight, OutputError().metric(measured(inputs)), most)
    ut = prepared.arrays["ut"].double()
    assert torch.isfinite(ut).all()
    torch.testing.assert_close(ut @ ut.T, torch.eye(most, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (prepared.loss >= 0).all()
    assert (prepared.loss.diff() <= 0).all()
    enough = min(most, tokens, in_features)
    assert float(prepared.loss[enough]) <= 1e-9 * float(prepared.loss[0]) + 1e-12


def test_a_smaller_budget_is_a_prefix_of_a_larger_one() -> None:
    weight = weight_of((20, 30))
    metric = OutputError().metric(measured(correlated(100, 30)))
    small, large = (ProjectOutputs().prepare(weight, metric, rank) for rank in (4, 9))
    assert torch.equal(small.arrays["ut"], large.arrays["ut"][:4])
    assert torch.equal(small.arrays["v"], large.arrays["v"][:4])
    assert torch.equal(small.loss, large.loss[:5])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = weight_of((6, 5))
    weight[2, 3] = value
    with pytest.raises(NumericsError, match="not finite"):
        ProjectOutputs().prepare(weight, Plain(), 2)


def test_a_damaged_gram_is_refused() -> None:
    stats = measured(correlated(10, 4))
    stats.gram[1, 1] = -1.0
    with pytest.raises(NumericsError, match="negative diagonal"):
        OutputError().metric(stats)
