"""What the least-squares fit of entries whose places are given promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.fit import Fitter, Moments
from compress_core.refine.masked import (
    MaskedLeastSquares,
    PrefixMaskedLeastSquares,
    masked_solve,
)
from compress_core.sparse import Sparse
from tests.made_up import weight_and_inputs


def test_the_masked_solution_is_that_of_least_squares() -> None:
    weight, dense, _ = weight_and_inputs((6, 10), 80, 0)
    gram = dense.T @ dense / len(dense)
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[2] = False
    found = masked_solve(torch.zeros_like(weight), mask, gram, weight @ gram, 60)
    for row in range(6):
        inside = mask[row]
        truth = torch.linalg.lstsq(dense[:, inside], dense @ weight[row]).solution
        assert found[row][inside] == pytest.approx(truth, abs=1e-8)
        assert not found[row][~inside].any()


@settings(max_examples=15)
@given(st.integers(0, 4), st.integers(0, 100))
def test_a_refit_never_errs_more_and_keeps_rank_and_places(rank: int, seed: int) -> None:
    weight, dense, behind = weight_and_inputs((12, 20), 100, seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(12, 20, generator=generator) < 0.3
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    low = LowRank(u[:, :rank] * s[:rank], v[:rank], sparse=Sparse.of(0.5 * weight, mask))
    gram, cross = behind.T @ behind / 100, dense.T @ behind / 100
    cases: list[tuple[Fitter, Moments, Tensor]] = [
        (MaskedLeastSquares(damp=0.0), Moments(dense=dense.T @ dense / 100), dense),
        (PrefixMaskedLeastSquares(damp=0.0), Moments(prefix=gram, cross=cross), behind),
    ]
    for refiner, moments, inputs in cases:
        fitted = refiner.fit(weight, low, moments)
        assert fitted.rank == rank and fitted.sparse is not None
        assert torch.equal(fitted.sparse.mask, mask)
        errors = [
            float((inputs @ x.dense().T - dense @ weight.T).square().sum()) for x in (low, fitted)
        ]
        assert errors[1] <= errors[0] * (1 + 1e-9)
    bare = LowRank(low.u, low.v)
    if rank:
        again = MaskedLeastSquares().fit(weight, bare, cases[0][1])
        assert again.sparse is None and again.rank == rank


def test_with_a_ridge_directions_that_inputs_hardly_have_count_too() -> None:
    """A ridge below the pseudo-inverse's floor would leave them out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 60, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q
    energy = torch.arange(1.0, 61).pow(-6).double()
    p, damp = (basis * energy) @ basis.T, 1e-6
    start = LowRank(torch.zeros(24, 20).double(), torch.zeros(20, 60).double())
    fit = MaskedLeastSquares(damp=damp).solve(weight, start, p, weight @ p)
    ridged = energy + damp * energy.mean()
    error = (((fit.dense() - weight) @ basis).square() * ridged).sum()
    tail = torch.linalg.svdvals((weight @ basis) * ridged.sqrt())[20:].square().sum()
    assert float(error) == pytest.approx(float(tail), rel=1e-6)
