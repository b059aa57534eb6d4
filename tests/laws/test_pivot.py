"""The pivot form: nothing is lost, its numbers stay small, and it costs what PIFA says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core.forms.names import FACTORS
from compress_core.forms.part import Sizes
from compress_core.forms.pivot import LARGEST, Pivot, pivot_rows
from compress_core.forms.products import largest_rank, product_form, rank_cost
from compress_core.types import LayerRef

SIDES = st.integers(2, 40)


def product(out: int, inputs: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U and V with components of very unequal size."""
    draw = torch.Generator().manual_seed(seed)
    u = torch.randn(out, rank, generator=draw, dtype=torch.float64)
    v = torch.randn(rank, inputs, generator=draw, dtype=torch.float64)
    return u * torch.logspace(0, -5, rank, dtype=torch.float64), v


@settings(max_examples=60, deadline=None)
@given(out=SIDES, inputs=SIDES, part=st.floats(0, 1), seed=st.integers(0, 1000))
def test_it_loses_nothing_and_its_numbers_stay_small(
    out: int, inputs: int, part: float, seed: int
) -> None:
    rank = 1 + int(part * (min(out, inputs) - 1))
    u, v = product(out, inputs, rank, seed)
    tensors = Pivot.pack(u, v, torch.float64)
    found = Pivot.dense(tensors, Sizes(out, inputs))
    torch.testing.assert_close(found, u @ v, rtol=0, atol=1e-11 * float((u @ v).abs().max()))
    assert not tensors["weight"].numel() or float(tensors["weight"].abs().max()) <= LARGEST + 1e-9


def test_rows_of_a_product_of_lower_rank_than_it_says_lose_nothing_either() -> None:
    u, v = product(12, 9, 5, seed=0)
    u[:, 3:] = 0
    u[4] = u[2]
    found = Pivot.dense(Pivot.pack(u, v, torch.float64), Sizes(12, 9))
    torch.testing.assert_close(found, u @ v)


def test_the_pivots_are_rows_of_the_weight() -> None:
    u, v = product(20, 16, 6, seed=1)
    tensors = Pivot.pack(u, v, torch.float64)
    basis = torch.linalg.qr(u)[0]
    rows, others, c = pivot_rows(basis)
    assert sorted([*rows.tolist(), *others.tolist()]) == list(range(20))
    torch.testing.assert_close(tensors["pivot_in"], (u @ v)[rows])
    torch.testing.assert_close(c @ (u @ v)[rows], (u @ v)[others])


@pytest.mark.parametrize(("out", "inputs"), [(4096, 4096), (11008, 4096), (1024, 4096), (576, 576)])
@pytest.mark.parametrize("kept", [0.9, 0.8, 0.6, 0.4])
def test_the_rank_is_that_of_the_formula(out: int, inputs: int, kept: float) -> None:
    """r = ((m + n) − √((m + n)² − 4 k m n)) / 2 but for the bits, as in PIFA's section 3."""
    both, numbers = out + inputs, kept * out * inputs
    formula = (both - math.sqrt(both**2 - 4 * numbers)) / 2
    layer = LayerRef("x", 0, out, inputs, "x", form="pivot")
    assert formula - 2 < layer.affordable_rank(int(numbers)) <= formula
    assert abs(layer.ideal_rank(numbers) - formula) < 2


@settings(max_examples=80, deadline=None)
@given(form=st.sampled_from(FACTORS), out=SIDES, inputs=SIDES, numbers=st.floats(0, 2000))
def test_ranks_are_priced_by_the_kind_that_stores_them(
    form: str, out: int, inputs: int, numbers: float
) -> None:
    layer = LayerRef("x", 0, out, inputs, "x", form=form)
    costs = [layer.rank_cost(rank) for rank in range(min(out, inputs) + 1)]
    assert costs[0] == 0 and costs == sorted(costs)
    for rank, cost in enumerate(costs):
        kind, entry = product_form(form, rank, out, inputs)
        assert kind.numbers(entry, Sizes(out, inputs)) == cost
    affordable = [rank for rank, cost in enumerate(costs) if cost <= int(numbers)]
    assert largest_rank(form, int(numbers), out, inputs) == affordable[-1]
    assert layer.paying_rank == max(r for r, cost in enumerate(costs) if cost < out * inputs)


def test_auto_is_the_smaller_of_both() -> None:
    for rank in range(1, 30):
        plain, pivot, auto = (rank_cost(form, rank, 400, 40) for form in FACTORS)
        assert auto == min(plain, pivot)
    assert rank_cost("auto", 2, 400, 40) == rank_cost("plain", 2, 400, 40)
    assert rank_cost("auto", 20, 400, 40) == rank_cost("pivot", 20, 400, 40)
