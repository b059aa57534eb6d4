"""Statistics do not depend on how the text was cut into batches, and never hide a bad value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core.errors import NumericsError
from compress_core.stats import InputAccumulator


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_cut_into_batches_gives_the_same_sums(sizes: list[int], seed: int) -> None:
    inputs = torch.randn(sum(sizes), 7, 6, generator=torch.Generator().manual_seed(seed))
    whole, parts = InputAccumulator(6), InputAccumulator(6)
    whole.add(inputs)
    for part in inputs.split(sizes):
        parts.add(part)
    one, many = whole.finish(), parts.finish()
    assert one.tokens == many.tokens == 7 * sum(sizes)
    torch.testing.assert_close(one.gram, many.gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.abs_sum, many.abs_sum, rtol=1e-12, atol=1e-12)


def test_sums_are_what_their_names_say() -> None:
    inputs = torch.randn(3, 5, 4)
    accumulator = InputAccumulator(4)
    accumulator.add(inputs)
    stats = accumulator.finish()
    rows = inputs.reshape(-1, 4).double()
    torch.testing.assert_close(stats.gram, rows.T @ rows)
    torch.testing.assert_close(stats.abs_sum, rows.abs().sum(0))
    assert torch.equal(stats.gram, stats.gram.T)


def test_sums_stay_float64_when_products_are_float32() -> None:
    inputs = torch.randn(64, 32, 8)
    exact, fast = InputAccumulator(8), InputAccumulator(8, products=torch.float32)
    for batch in inputs.split(4):
        exact.add(batch)
        fast.add(batch)
    assert fast.finish().gram.dtype is torch.float64
    torch.testing.assert_close(exact.finish().gram, fast.finish().gram, rtol=1e-5, atol=1e-3)
    assert not torch.equal(exact.finish().gram, fast.finish().gram)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_names_its_sample(value: float) -> None:
    inputs = torch.zeros(4, 3, 2)
    inputs[2, 1, 0] = value
    with pytest.raises(NumericsError, match="calibration sample 12"):
        InputAccumulator(2).add(inputs, first_sample=10)
