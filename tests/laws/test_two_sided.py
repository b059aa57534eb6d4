"""The metric of inputs and outputs: the literal optimum, its curve, and what fits do in it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.curvature import OutputFisher, divergence_by_rank
from compress_core.decompose import LowRank, ProjectOutputs, project
from compress_core.errors import ConfigError, NumericsError
from compress_core.fit import Fitter, Moments
from compress_core.metric import Diagonal, Metric, Plain, SecondMoment
from compress_core.refine.columns import PreserveColumns
from compress_core.refine.cross_truncation import CrossTruncate
from compress_core.refine.least_squares import Alternate
from compress_core.two_sided import FitTwoSided, ProjectTwoSided, Root, TwoSided, balanced
from compress_core.types import Share
from tests import literal
from tests.by_hand import first_rows
from tests.made_up import SEEDS, weight_and_inputs

TOKENS = 160
SHAPES = st.tuples(st.integers(3, 20), st.integers(3, 20))
RANKS = st.integers(1, 8)
PLACES = [(9, 14), (15, 8), (10, 10)]


def fisher_of(out: int, seed: int, scale: float = 1.0) -> OutputFisher:
    """Gradients of which some directions are far larger than others."""
    draw = torch.Generator().manual_seed(seed + 77)
    gradients = torch.randn(TOKENS, out, generator=draw, dtype=torch.float64)
    gradients *= scale * torch.linspace(0.05, 3, out, dtype=torch.float64)
    return OutputFisher(TOKENS, gradients.T @ gradients)


def case(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, OutputFisher]:
    """W, H and the gradients."""
    weight, inputs, _ = weight_and_inputs(shape, TOKENS, seed)
    return weight, inputs.T @ inputs / TOKENS, fisher_of(shape[0], seed)


def made(
    weight: Tensor, metric: Metric, fisher: OutputFisher, rank: int, damp: float = 0.1
) -> LowRank:
    """What is stored of a rank, as it is read."""
    decomposer = ProjectTwoSided(root=lambda: TwoSided(damp).root(fisher))
    return decomposer.realise(
        first_rows(decomposer.prepare(weight, metric, min(weight.shape))), Share(rank)
    )


def error_of(product: Tensor, weight: Tensor, h: Tensor, g: Tensor) -> float:
    """tr(G E H Eᵀ)."""
    rest = weight - product.double()
    return float((g @ rest @ h * rest).sum())


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, rank=RANKS, seed=SEEDS, damp=st.floats(0.01, 10))
def test_the_truncation_is_the_literal_formula(
    shape: tuple[int, int], rank: int, seed: int, damp: float
) -> None:
    (weight, h, fisher), rank = case(shape, seed), min(rank, *shape)
    root = TwoSided(damp).root(fisher)
    u, v, energy = project(root.scale(weight), SecondMoment(h), rank)
    u, v = root.unscale(u, v)
    g = fisher.damped(damp)
    expected = literal.two_sided(weight, h, g, rank)
    torch.testing.assert_close(u @ v, expected, rtol=0, atol=1e-7 * float(weight.abs().max()))
    singular = torch.linalg.svdvals(literal.root(g) @ weight @ literal.root(h))
    torch.testing.assert_close(energy, singular**2, rtol=1e-7, atol=1e-9 * float(energy[0]))
    left = error_of(u @ v, weight, h, g)
    assert left == pytest.approx(float((singular[rank:] ** 2).sum()), rel=1e-6, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, rank=RANKS, seed=SEEDS)
def test_what_is_stored_is_that_to_rounding_and_its_loss_is_its_error(
    shape: tuple[int, int], rank: int, seed: int
) -> None:
    (weight, h, fisher), rank = case(shape, seed), min(rank, *shape)
    low, g = made(weight, SecondMoment(h), fisher, rank), fisher.damped(0.1)
    expected = literal.two_sided(weight, h, g, rank)
    torch.testing.assert_close(
        low.dense().double(), expected, rtol=0, atol=2e-5 * float(weight.abs().max())
    )
    torch.testing.assert_close(low.u.norm(dim=0), torch.ones(rank), rtol=0, atol=1e-6)
    decomposer = ProjectTwoSided(root=lambda: TwoSided().root(fisher))
    loss = decomposer.prepare(weight, SecondMoment(h), rank).loss
    error = error_of(low.dense(), weight, h, g)
    assert error == pytest.approx(float(loss[rank]), rel=1e-4, abs=1e-6 * float(loss[0]))


@pytest.mark.parametrize("shape", PLACES)
@pytest.mark.parametrize("kind", ["plain", "diagonal", "second moment"])
def test_outputs_that_count_alike_change_nothing_but_the_scale_of_the_loss(
    shape: tuple[int, int], kind: str
) -> None:
    weight, h, _ = case(shape, 3)
    scales = torch.linspace(0.5, 2, shape[1], dtype=torch.float64)
    metrics: dict[str, Metric] = {
        "plain": Plain(),
        "diagonal": Diagonal(scales),
        "second moment": SecondMoment(h),
    }
    alike = OutputFisher(TOKENS, 0.02 * TOKENS * torch.eye(shape[0], dtype=torch.float64))
    decomposer = ProjectTwoSided(root=lambda: TwoSided().root(alike))
    both = decomposer.prepare(weight, metrics[kind], 6)
    one = ProjectOutputs().prepare(weight, metrics[kind], 6)
    torch.testing.assert_close(both.loss, 0.022 * one.loss, rtol=1e-9, atol=1e-12)
    for rank in range(1, 7):
        products = [(p.arrays["ut"][:rank].T @ p.arrays["v"][:rank]) for p in (both, one)]
        torch.testing.assert_close(*products, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", PLACES)
@pytest.mark.parametrize("damp", [0.03, 0.3])
def test_its_curve_is_twice_the_predicted_divergence_at_the_same_damping(
    shape: tuple[int, int], damp: float
) -> None:
    weight, h, fisher = case(shape, 5)
    decomposer = ProjectTwoSided(root=lambda: TwoSided(damp).root(fisher))
    prepared = decomposer.prepare(weight, SecondMoment(h), min(shape))
    u, v = prepared.arrays["ut"].T, prepared.arrays["v"]
    predicted = divergence_by_rank(weight, u, v, h, fisher.damped(damp))
    torch.testing.assert_close(
        predicted, prepared.loss / 2, rtol=1e-4, atol=1e-6 * float(prepared.loss[0])
    )


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_scale_of_gradients_is_in_the_loss_and_in_nothing_else(scale: float) -> None:
    weight, h, fisher = case((10, 12), 7)
    loud = OutputFisher(TOKENS, scale * fisher.gram)
    wanted, found = (made(weight, SecondMoment(h), f, 4) for f in (fisher, loud))
    torch.testing.assert_close(found.u.abs(), wanted.u.abs(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.dense(), wanted.dense(), rtol=0, atol=1e-5)


@given(seed=SEEDS, rank=RANKS)
def test_balancing_keeps_the_product_and_leaves_columns_of_zeros(seed: int, rank: int) -> None:
    weight, _, _ = weight_and_inputs((9, 7), 1, seed)
    u, v = weight[:, :5].clone(), weight.T[:5]
    u[:, 2] = 0
    found_u, found_v = balanced(u, v)
    torch.testing.assert_close(found_u[:, :rank] @ found_v[:rank], u[:, :rank] @ v[:rank])
    lengths = torch.tensor([1, 1, 0, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(found_u.norm(dim=0), lengths)


FITTERS: dict[str, Fitter] = {
    "out-factor": Alternate(0),
    "both": Alternate(2),
    "both, toward the dense model": Alternate(2, 1.0),
    "cross": CrossTruncate(1 / 3, 1 / 3),  # beta is 1/4
    "columns": PreserveColumns(accept=0.0),
    "columns, fitted": PreserveColumns(refit=True, search="grid", accept=0.0),
}
each_fitter = pytest.mark.parametrize("name", FITTERS)


def in_metric(fitter: Fitter, root: Root) -> FitTwoSided:
    """The fitter in the metric of a root."""
    return FitTwoSided(fitter, lambda: root, lambda: root.lower.norm(dim=1))


def fitted(
    name: str, shape: tuple[int, int], seed: int, root: Root | None
) -> tuple[LowRank, LowRank, Tensor, Moments]:
    """A start, what a fitter makes of it, the weight and the moments."""
    weight, dense, behind = weight_and_inputs(shape, TOKENS, seed)
    weight = literal.truncate(weight, 2) + 0.1 * weight
    weight[:, :8] = 4 * weight_and_inputs(shape, 1, seed + 1)[0][:, :8]  # worth keeping
    cross = dense.T @ behind / TOKENS
    h, prefix = dense.T @ dense / TOKENS, behind.T @ behind / TOKENS
    moments = Moments(dense=h, prefix=prefix, cross=cross)
    scaled = weight if root is None else root.scale(weight)
    u, v, _ = project(scaled, SecondMoment(h), 6)
    start = LowRank(u, v) if root is None else LowRank(*root.unscale(u, v))
    fit = FITTERS[name] if root is None else in_metric(FITTERS[name], root)
    return start, fit.fit(weight, start, moments), weight, moments


@each_fitter
@pytest.mark.parametrize("shape", [(20, 24), (26, 18)])
def test_fits_do_the_same_where_outputs_count_alike(name: str, shape: tuple[int, int]) -> None:
    eye = torch.eye(shape[0], dtype=torch.float64)
    alike = TwoSided().root(OutputFisher(1, 9 * eye))
    _, found, _, _ = fitted(name, shape, 1, alike)
    _, wanted, _, _ = fitted(name, shape, 1, None)
    torch.testing.assert_close(found.dense(), wanted.dense(), rtol=0, atol=1e-7)
    columns = [() if low.index is None else low.index.tolist() for low in (found, wanted)]
    assert columns[0] == columns[1]
    assert bool(columns[0]) == ("columns" in name) or shape == (26, 18)


@each_fitter
@pytest.mark.parametrize("seed", [1, 2])
def test_a_fit_lowers_the_error_that_it_is_for(name: str, seed: int) -> None:
    """And, where it searches for nothing, more than the fit that knows nothing of the outputs."""
    shape = (20, 24)
    fisher = fisher_of(shape[0], seed)
    root, g = TwoSided().root(fisher), fisher.damped(0.1)
    start, found, weight, moments = fitted(name, shape, seed, root)
    _, blind, _, _ = fitted(name, shape, seed, None)
    prefix, cross, dense = moments.prefix, moments.cross, moments.dense
    assert prefix is not None and cross is not None and dense is not None

    def error(low: LowRank) -> float:
        product, own = low.dense(), weight
        if "columns" in name:
            return error_of(product, own, dense, g)
        if name in ("out-factor", "both"):
            return error_of(product, own, prefix, g)
        toward = cross if "toward" in name else (3 * prefix + cross) / 4
        # ‖A (u v x − what it is fitted to)‖² but for what does not depend on u v
        return float((g @ product * (product @ prefix - 2 * own @ toward)).sum())

    assert error(found) < error(start)
    if name != "out-factor" and "columns" not in name:
        assert error(found) < error(blind)


def test_the_out_factor_alone_is_fitted_as_without_outputs() -> None:
    """u = W T vᵀ (v H vᵀ)⁺ whatever weighs the rows."""
    fisher = fisher_of(20, 4)
    root = TwoSided().root(fisher)
    start, found, weight, moments = fitted("out-factor", (20, 24), 4, root)
    wanted = Alternate(0).fit(weight, start, moments)
    torch.testing.assert_close(found.dense(), wanted.dense(), rtol=0, atol=1e-7)


def test_columns_kept_as_they_are_are_so_to_the_bit() -> None:
    root = TwoSided().root(fisher_of(20, 5))
    _, found, weight, _ = fitted("columns", (20, 24), 5, root)
    assert found.columns is not None and found.index is not None
    assert torch.equal(found.columns, weight[:, found.index])


def test_without_an_earlier_error_cross_statistics_truncate() -> None:
    weight, h, fisher = case((12, 15), 6)
    moments = Moments(prefix=h, cross=h)
    root = TwoSided().root(fisher)
    start = LowRank(torch.zeros(12, 4), torch.zeros(4, 15))
    found = in_metric(CrossTruncate(), root).fit(weight, start, moments)
    expected = literal.two_sided(weight, h, fisher.damped(0.1), 4)
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("seed", [1, 2])
def test_lengths_of_the_factors_rows_need_no_factor(seed: int) -> None:
    fisher = fisher_of(14, seed)
    wanted = torch.linalg.vector_norm(TwoSided().root(fisher).lower, dim=1)
    torch.testing.assert_close(TwoSided().lengths(fisher), wanted)


def test_no_gradient_at_all_is_refused() -> None:
    silent = OutputFisher(5, torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(
        NumericsError, match=r"none of its outputs has a gradient.*leave out metric"
    ):
        TwoSided().root(silent)
    with pytest.raises(NumericsError, match=r"none of its outputs has a gradient"):
        TwoSided().lengths(silent)


def test_damping_that_is_lost_in_rounding_is_refused() -> None:
    gradient = torch.linspace(1, 2, 8, dtype=torch.float64)[None]
    known = OutputFisher(1, gradient.T @ gradient)  # one token: one direction
    assert TwoSided(1e-3).root(known).lower.isfinite().all()
    with pytest.raises(
        NumericsError, match="singular to rounding: give more than metric_damp=1e-0"
    ):
        TwoSided(1e-9).root(known)


@pytest.mark.parametrize("damp", [0.0, -1.0, float("inf"), float("nan")])
def test_damping_is_a_positive_number(damp: float) -> None:
    with pytest.raises(ConfigError, match="metric_damp must be above 0"):
        TwoSided(damp)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight, h, fisher = case((6, 5), 8)
    weight[2, 3] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        made(weight, SecondMoment(h), fisher, 2)
