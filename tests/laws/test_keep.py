"""What CAP's budget set, estimator and cut promise, against brute force."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_core.learn.bernoulli import EPSILON, reinforce
from compress_core.learn.group import leave_one_out
from compress_core.learn.keep import fill, probabilities, project, ranking, spent

numbers = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=12)


def with_costs(values: list[float], data: st.DataObject) -> tuple[Tensor, Tensor]:
    costs = data.draw(
        st.lists(st.integers(1, 9), min_size=len(values), max_size=len(values)), "costs"
    )
    return torch.tensor(values, dtype=torch.float64), torch.tensor(costs)


@given(numbers, st.floats(0, 40), st.data())
def test_the_projection_is_feasible_idempotent_and_nearest(
    values: list[float], budget: float, data: st.DataObject
) -> None:
    wanted, costs = with_costs(values, data)
    found = project(wanted, costs, budget)
    assert bool(((found >= 0) & (found <= 1)).all()) and spent(found, costs) <= budget + 1e-9
    assert project(found, costs, budget + 1e-9) == pytest.approx(found, abs=1e-8)
    generator = torch.Generator().manual_seed(0)  # obtuse angle to every feasible point
    for _ in range(30):
        other = torch.rand(len(found), generator=generator, dtype=torch.float64)
        other *= min(1.0, budget / max(spent(other, costs), 1e-9))
        assert float((wanted - found) @ (other - found)) <= 1e-6


@given(numbers, st.floats(0.5, 40), st.data())
def test_first_probabilities_spend_the_budget_in_the_order_of_worth(
    values: list[float], budget: float, data: st.DataObject
) -> None:
    logits, costs = with_costs(values, data)
    found = probabilities(logits, costs, budget)
    assert spent(found, costs) == pytest.approx(min(budget, float(costs.sum())), rel=1e-6)
    order = logits.argsort()
    assert bool((found[order].diff() >= -1e-12).all())


def test_worthless_items_have_no_probability() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 1.0])
    found = probabilities(logits, torch.tensor([5, 2, 2]), 3)
    assert found[0] == 0 and spent(found, torch.tensor([5, 2, 2])) == pytest.approx(3)
    assert not probabilities(logits[:1], torch.tensor([5]), 3).any()


@given(numbers, st.integers(0, 50), st.data())
def test_the_fill_takes_all_that_fits_in_order(
    values: list[float], room: int, data: st.DataObject
) -> None:
    score, costs = with_costs(values, data)
    order = ranking(score, score)
    bought, left = fill(order, costs, room)
    expected, rest = [], room
    for item in order.tolist():
        if int(costs[item]) <= rest:
            expected.append(item)
            rest -= int(costs[item])
    assert (bought.tolist(), left) == (expected, rest)


def test_ties_go_by_worth_and_then_by_place() -> None:
    score = torch.tensor([1.0, 1.0, 2.0, 1.0])
    assert ranking(score, torch.tensor([0.0, 3.0, 0.0, 3.0])).tolist() == [2, 1, 3, 0]


def test_reinforce_is_unbiased_whatever_the_baseline() -> None:
    """E over all masks of the estimate is the derivative of E[J], J any function of the mask."""
    s = torch.tensor([0.2, 0.7, 0.5], dtype=torch.float64)
    loss = {mask: float(i * i % 7) for i, mask in enumerate(itertools.product((0, 1), repeat=3))}

    def expected(s: Tensor) -> Tensor:
        total = torch.zeros((), dtype=s.dtype)
        for mask, value in loss.items():
            m = torch.tensor(mask, dtype=s.dtype)
            total = total + value * (s * m + (1 - s) * (1 - m)).prod()
        return total

    (truth,) = torch.autograd.grad(expected(leaf := s.clone().requires_grad_(True)), leaf)
    for baseline in (0.0, 3.0):
        mean = torch.zeros_like(s)
        for mask, value in loss.items():
            m = torch.tensor(mask)
            chance = (s * m + (1 - s) * (1 - m)).prod()
            mean += chance * reinforce(value - baseline, m, s)
        assert mean == pytest.approx(truth, abs=50 * EPSILON)


def test_leave_one_out_compares_with_the_others() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert leave_one_out(losses).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    assert leave_one_out(losses[:1]).tolist() == [0.0]


def test_no_budget_buys_nothing_whatever_the_dtype_of_costs() -> None:
    wanted = torch.tensor([0.0, 0.0, 0.0, 1.7171722650527954], dtype=torch.float64)
    for dtype in (torch.int64, torch.int32, torch.float64):
        costs = torch.tensor([1, 1, 1, 9], dtype=dtype)
        assert spent(project(wanted, costs, 0.0), costs) <= 1e-9
