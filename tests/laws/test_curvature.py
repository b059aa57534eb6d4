"""The divergence that a truncation is predicted to leave: the literal trace, rank by rank."""

import pytest
import torch
from torch import Tensor

from compress_core.curvature import OutputFisher, divergence_by_rank
from compress_core.decompose import ProjectOutputs
from compress_core.metric import Diagonal, Metric, Plain, SecondMoment

SHAPES = {"wide": (9, 14), "tall": (15, 8), "square": (10, 10)}


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def semidefinite(features: int, seed: int) -> Tensor:
    rows = normal(features + 3, features, seed=seed) * torch.linspace(0.2, 2, features)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", ["its own", "plain", "diagonal"])
@pytest.mark.parametrize("short", [0, 4])
def test_it_is_the_trace_of_the_error_of_the_stored_factors(
    shape: str, metric: str, short: int
) -> None:
    out, into = SHAPES[shape]
    w, h, g = normal(out, into, seed=1), semidefinite(into, 2), semidefinite(out, 3)
    kinds: dict[str, Metric] = {
        "its own": SecondMoment(h),
        "plain": Plain(),
        "diagonal": Diagonal(torch.linspace(0.5, 2, into, dtype=torch.float64)),
    }
    ranks = min(out, into) - short
    prepared = ProjectOutputs().prepare(w, kinds[metric], ranks)
    u, v = prepared.arrays["ut"].T, prepared.arrays["v"]
    found = divergence_by_rank(w, u, v, h, g)
    assert found.shape == (ranks + 1,)
    for rank, value in enumerate(found):
        error = w - u[:, :rank].double() @ v[:rank].double()
        literal = torch.trace(g @ error @ h @ error.T) / 2
        assert float(value) == pytest.approx(float(literal), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_its_own_metric_every_component_costs_its_energy_times_its_slope(shape: str) -> None:
    """½ Σ λ_i u_iᵀ G u_i, with nothing across: v_i H v_jᵀ = λ_i δ_ij."""
    out, into = SHAPES[shape]
    w, h, g = normal(out, into, seed=4), semidefinite(into, 5), semidefinite(out, 6)
    prepared = ProjectOutputs().prepare(w, SecondMoment(h), min(out, into))
    u, v = prepared.arrays["ut"].T, prepared.arrays["v"]
    energy = prepared.loss[:-1] - prepared.loss[1:]
    slopes = ((g @ u.double()) * u).sum(dim=0)
    left = (energy * slopes).flip(0).cumsum(0).flip(0) / 2
    found = divergence_by_rank(w, u, v, h, g)
    torch.testing.assert_close(found[:-1], left, rtol=1e-5, atol=1e-6)
    assert float(found[-1]) == pytest.approx(0, abs=1e-6)


def test_small_errors_of_a_softmax_cost_what_is_predicted() -> None:
    """One linear layer before a softmax: G is the mean of diag(p) − p pᵀ, known in closed form."""
    w, x = normal(7, 5, seed=7), normal(1, 5, seed=8)
    p = (x @ w.T).softmax(-1)
    g, h = p[0].diag() - p.T @ p, x.T @ x
    u, v = 1e-3 * normal(7, 2, seed=9), normal(2, 5, seed=10)
    changed = w - u @ v  # what w becomes without two components
    kl = (p * (p.log() - (x @ changed.T).log_softmax(-1))).sum()
    predicted = divergence_by_rank(w, u, v, h, g)[0] - divergence_by_rank(changed, u, v, h, g)[0]
    whole = divergence_by_rank(u @ v, u, v, h, g)[0]
    assert float(whole) == pytest.approx(float(kl), rel=1e-2)
    assert predicted.isfinite()


def test_damping_adds_a_part_of_the_mean_diagonal() -> None:
    gram = semidefinite(6, 11) * 40
    fisher = OutputFisher(40, gram)
    torch.testing.assert_close(fisher.damped(0.0), gram / 40)
    added = fisher.damped(0.1) - gram / 40
    mean = float(gram.diagonal().mean()) / 40
    torch.testing.assert_close(added, 0.1 * mean * torch.eye(6, dtype=torch.float64))


def test_what_is_kept_is_half_of_it_in_float32() -> None:
    fisher = OutputFisher(40, semidefinite(6, 12))
    packed = fisher.pack()
    assert packed.tensors["gradient_gram"].shape == (21,)
    assert packed.tensors["gradient_gram"].dtype is torch.float32
    again = OutputFisher.unpack(packed)
    assert again.tokens == 40 and again.gram.dtype is torch.float64
    torch.testing.assert_close(again.gram, fisher.gram, rtol=1e-6, atol=1e-7)
