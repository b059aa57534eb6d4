"""What CAP's budget sets, selection and estimator promise, against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.learn import select
from compress_core.learn.bernoulli import EPSILON, reinforce
from compress_core.learn.group import leave_one_out
from compress_core.learn.keep import Prices, probabilities, project, ranking, shift, spent
from compress_core.learn.select import Run, buy, fill, ordered

numbers = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=12)
scores = st.floats(width=32, allow_nan=False)


def priced(values: list[float], data: st.DataObject) -> tuple[Tensor, Prices]:
    cut = data.draw(st.integers(0, len(values)), "first run")
    prices = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)), "prices")
    runs = [(cut, prices[0]), (len(values) - cut, prices[1])]
    return torch.tensor(values, dtype=torch.float64), Prices(runs)


@given(numbers, st.floats(0, 40), st.data())
def test_the_projection_is_feasible_idempotent_and_nearest(
    values: list[float], budget: float, data: st.DataObject
) -> None:
    wanted, prices = priced(values, data)
    found = wanted.clone()
    project(found, prices, budget)
    assert bool(((found >= 0) & (found <= 1)).all()) and spent(found, prices) <= budget + 1e-9
    again = found.clone()
    project(again, prices, budget + 1e-9)
    assert again == pytest.approx(found, abs=1e-8)
    generator = torch.Generator().manual_seed(0)  # obtuse angle to every feasible point
    for _ in range(30):
        other = torch.rand(len(found), generator=generator, dtype=torch.float64)
        other *= min(1.0, budget / max(spent(other, prices), 1e-9))
        assert float((wanted - found) @ (other - found)) <= 1e-6


@given(numbers, st.floats(0, 40), st.data())
def test_the_shift_keeps_the_order_and_spends_the_budget(
    values: list[float], budget: float, data: st.DataObject
) -> None:
    wanted, prices = priced(values, data)
    found = wanted.clone()
    shift(found, prices, budget)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert spent(found, prices) == pytest.approx(min(budget, prices.total), abs=1e-6)
    assert bool((found[wanted.argsort()].diff() >= 0).all())


@given(numbers, st.floats(0.5, 40), st.data())
def test_first_probabilities_spend_the_budget_in_the_order_of_worth(
    values: list[float], budget: float, data: st.DataObject
) -> None:
    logits, prices = priced(values, data)
    found = probabilities(logits, prices, budget)
    assert spent(found, prices) == pytest.approx(min(budget, prices.total), rel=1e-6)
    assert bool((found[logits.argsort()].diff() >= -1e-12).all())


def test_worthless_items_have_no_probability() -> None:
    logits, prices = torch.tensor([-torch.inf, 0.0, 1.0]), Prices([(1, 5), (2, 2)])
    found = probabilities(logits, prices, 3)
    assert found[0] == 0 and spent(found, prices) == pytest.approx(3)
    assert not probabilities(logits[:1], Prices([(1, 5)]), 3).any()


@settings(max_examples=300)
@given(st.lists(st.tuples(st.lists(scores, max_size=12), st.integers(1, 9)), max_size=4), st.data())
def test_buying_without_a_sort_buys_what_a_sort_does(
    runs: list[tuple[list[float], int]], data: st.DataObject
) -> None:
    sizes = [len(values) for values, _ in runs]
    flags = data.draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes)), "taken")
    room = data.draw(st.integers(0, 60), "room")
    score = torch.tensor([x for values, _ in runs for x in values], dtype=torch.float32)
    taken = torch.tensor(flags, dtype=torch.bool)
    price = torch.tensor([price for values, price in runs for _ in values], dtype=torch.int64)
    expected, left = taken.clone(), room
    for item in ranking(score + 0.0, score + 0.0).tolist():
        if not expected[item] and int(price[item]) <= left:
            expected[item] = True
            left -= int(price[item])
    parts = zip(score.split(sizes), taken.split(sizes), strict=True) if runs else []
    made = [Run(x, y, p) for (x, y), (_, p) in zip(parts, runs, strict=True)]
    sizes_of = (select.PIECE, select.AHEAD)
    select.PIECE, select.AHEAD = data.draw(st.sampled_from([(3, 1), (7, 2), sizes_of]), "pieces")
    try:
        assert buy(made, room) == left
    finally:
        select.PIECE, select.AHEAD = sizes_of
    assert torch.equal(taken, expected)


@given(st.lists(scores, min_size=1, max_size=20))
def test_bit_patterns_are_in_the_order_of_scores(values: list[float]) -> None:
    score = torch.tensor(values, dtype=torch.float32)
    bits = ordered(score)
    assert torch.equal(bits[:, None] < bits, score[:, None] < score)
    assert torch.equal(bits[:, None] == bits, score[:, None] == score)


@given(numbers, st.integers(0, 50), st.data())
def test_the_fill_takes_all_that_fits_in_order(
    values: list[float], room: int, data: st.DataObject
) -> None:
    score = torch.tensor(values)
    costs = st.lists(st.integers(1, 9), min_size=len(values), max_size=len(values))
    prices = torch.tensor(data.draw(costs, "prices"))
    order = ranking(score, score)
    bought, left = fill(order, prices, room)
    expected, rest = [], room
    for item in order.tolist():
        if int(prices[item]) <= rest:
            expected.append(item)
            rest -= int(prices[item])
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


def test_no_budget_buys_nothing() -> None:
    wanted = torch.tensor([0.0, 0.0, 0.0, 1.7171722650527954], dtype=torch.float64)
    prices = Prices([(3, 1), (1, 9)])
    project(wanted, prices, 0.0)
    assert spent(wanted, prices) <= 1e-9
