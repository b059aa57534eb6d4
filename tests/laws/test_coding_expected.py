"""What codes are expected to cost: the sum as it is written, and how it grows with its parts."""

import pytest
import torch
from torch import Tensor

from compress_core.coding.expected import (
    DAMPING,
    PARTS,
    Inputs,
    curve_of_codes,
    steps_squared,
    whole_cost_of_codes,
)
from compress_core.forms.names import FACTORS, FULL, WIDTHS
from compress_core.prune.obs import damped

SHAPES = {"wide": (9, 14), "tall": (15, 8), "square": (10, 10)}


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def semidefinite(features: int, seed: int) -> Tensor:
    rows = normal(features + 3, features, seed=seed) * torch.linspace(0.2, 2, features)
    return rows.T @ rows / len(rows)


def made(shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """W, H and G."""
    out, into = SHAPES[shape]
    return normal(out, into, seed=1), semidefinite(into, 2), semidefinite(out, 3)


def product(shape: str, rank: int) -> tuple[Tensor, Tensor]:
    out, into = SHAPES[shape]
    return normal(out, rank, seed=4), normal(rank, into, seed=5)


def whole_cost(w: Tensor, h: Tensor, g: Tensor, group: int) -> float:
    return whole_cost_of_codes(w, Inputs(h), g, group)


def product_cost(u: Tensor, v: Tensor, h: Tensor, g: Tensor, form: str) -> float:
    return float(curve_of_codes(u, v, Inputs(h), g, form, 4)[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [1, 4, 32])
def test_of_a_weight_it_is_the_sum_that_is_written(shape: str, group: int) -> None:
    """½ Σ_i G_ii Σ_j range_ij² d_j / 12, number by number; d_j from an inverse of its own."""
    w, h, g = made(shape)
    ready, found = damped(h, DAMPING), 0.0
    for j in range(w.shape[1]):
        left = 1 / float(torch.linalg.inv(ready[j:, j:])[0, 0])
        start = j // group * group
        for i in range(len(w)):
            numbers = [0.0, *w[i, start : start + group].tolist()]
            found += float(g[i, i]) * (max(numbers) - min(numbers)) ** 2 * left / 12 / 2
    assert whole_cost(w, h, g, group) == pytest.approx(found, rel=1e-9)


def test_codes_of_some_bits_cost_a_part_of_it_and_numbers_in_no_codes_nothing() -> None:
    assert [steps_squared(bits) for bits in WIDTHS] == [65025, 3969, 961, 225, 49, 9]
    assert 1.0 / steps_squared(FULL) == 0.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("times", [1e-3, 7.0, -2.0])
def test_it_grows_with_the_square_of_the_numbers_and_with_both_moments(
    shape: str, times: float
) -> None:
    w, h, g = made(shape)
    whole = whole_cost(w, h, g, 4)
    assert whole_cost(times * w, h, g, 4) == pytest.approx(times**2 * whole, rel=1e-9)
    assert whole_cost(w, times**2 * h, g, 4) == pytest.approx(times**2 * whole, rel=1e-9)
    assert whole_cost(w, h, times**2 * g, 4) == pytest.approx(times**2 * whole, rel=1e-9)
    u, v = product(shape, 5)
    for form in FACTORS:
        found = product_cost(u, v, h, g, form)
        more = product_cost(u, times * v, h, g, form)
        assert more == pytest.approx(times**2 * found, rel=1e-6)
        for moments in ((times**2 * h, g), (h, times**2 * g)):
            more = product_cost(u, v, *moments, form)
            assert more == pytest.approx(times**2 * found, rel=1e-6)


def test_zeros_and_inputs_that_are_always_zero_cost_nothing() -> None:
    w, h, g = made("wide")
    assert whole_cost(0 * w, h, g, 4) == 0.0
    first = torch.cat([w[:, :4], 0 * w[:, 4:]], dim=1)
    whole, alone = (whole_cost(x, h, g, 4) for x in (w, first))
    assert 0 < alone < whole
    dead = h.clone()
    dead[:4] = dead[:, :4] = 0
    wild = torch.cat([1e6 * w[:, :4], w[:, 4:]], dim=1)
    assert whole_cost(wild, dead, g, 4) == whole_cost(w, dead, g, 4)
    assert whole_cost(w, 0 * h, g, 4) == 0.0


def test_smaller_groups_cost_no_more() -> None:
    w, h, g = made("wide")
    costs = [whole_cost(w, h, g, group) for group in (1, 2, 4, 8, 16, 32)]
    assert costs == sorted(costs) and costs[0] < costs[3] and costs[-1] == costs[-2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FACTORS)
def test_a_curve_has_every_rank_and_is_the_products_own_at_those_looked_at(
    shape: str, form: str
) -> None:
    _, h, g = made(shape)
    ranks = 7
    u, v = product(shape, ranks)
    curve = curve_of_codes(u, v, Inputs(h), g, form, 4)
    assert curve.shape == (ranks + 1,) and curve.dtype == torch.float64 and float(curve[0]) == 0
    at = sorted({max(1, round(part * ranks)) for part in PARTS})
    assert at[-1] == ranks
    for rank in at:
        own = product_cost(u[:, :rank], v[:rank], h, g, form)
        assert float(curve[rank]) == pytest.approx(own, rel=1e-12)
    bends = curve.diff().diff().abs() > 1e-9 * curve.abs().max()
    assert set((bends.nonzero().flatten() + 1).tolist()) <= set(at)
    assert curve_of_codes(u[:, :0], v[:0], Inputs(h), g, form, 4).tolist() == [0.0]
