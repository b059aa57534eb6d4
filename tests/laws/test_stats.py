"""Statistics do not depend on how the text was cut into batches, and never hide a bad value."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.errors import NumericsError
from compress_core.stats import (
    STRIP,
    STRIPS_FROM,
    CosineAccumulator,
    InputAccumulator,
    PrefixAccumulator,
    StackOfBatch,
    buckets_of,
)
from tests import literal

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def pair(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """What the dense and the compressed model read: (samples, 7, 6) each, float32."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(samples, 7, 6, generator=generator)
    return dense, dense + 0.3 * torch.randn(samples, 7, 6, generator=generator)


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
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


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_any_cut_into_batches_gives_the_same_prefix_statistics(sizes: list[int], seed: int) -> None:
    dense, behind = pair(sum(sizes), seed)
    whole, parts = PrefixAccumulator(6), PrefixAccumulator(6)
    whole.add(dense, behind)
    for of_dense, part in zip(dense.split(sizes), behind.split(sizes), strict=True):
        parts.add(of_dense, part)
    one, many = whole.finish(), parts.finish()
    assert one.tokens == many.tokens == 7 * sum(sizes)
    torch.testing.assert_close(one.gram, many.gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.cross, many.cross, rtol=1e-12, atol=1e-12)
    rows, of_dense_rows = behind.reshape(-1, 6).double(), dense.reshape(-1, 6).double()
    torch.testing.assert_close(one.gram, rows.T @ rows)
    torch.testing.assert_close(one.cross, of_dense_rows.T @ rows)
    assert torch.equal(one.gram, one.gram.T)


def test_where_both_models_read_the_same_the_cross_statistics_are_the_gram() -> None:
    dense, _ = pair(4, 0)
    prefix, plain = PrefixAccumulator(6), InputAccumulator(6)
    prefix.add(dense, dense)
    plain.add(dense)
    stats = prefix.finish()
    torch.testing.assert_close(stats.cross, stats.gram, rtol=1e-14, atol=1e-14)
    assert torch.equal(stats.gram, plain.finish().gram)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, buckets=st.integers(1, 12), seed=st.integers(0, 99))
def test_stack_of_batch_is_the_papers_mean_of_buckets_whatever_the_batches(
    sizes: list[int], buckets: int, seed: int
) -> None:
    samples = sum(sizes)
    dense, behind = pair(samples, seed)
    bucket_of = buckets_of(samples, buckets, seed)
    accumulator, start = StackOfBatch(6, bucket_of), 0
    for of_dense, part in zip(dense.split(sizes), behind.split(sizes), strict=True):
        accumulator.add(of_dense, part, start)
        start += len(part)
    stats = accumulator.finish()
    order = sorted(range(samples), key=lambda sample: bucket_of[sample])
    means, dense_means = (
        literal.stack_of_batch(x.double(), order, min(buckets, samples)).reshape(-1, 6)
        for x in (behind, dense)
    )
    assert stats.tokens == len(means)
    torch.testing.assert_close(stats.gram, means.T @ means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.cross, dense_means.T @ means, rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(samples=st.integers(1, 60), buckets=st.integers(1, 80), seed=st.integers(0, 99))
def test_buckets_are_shuffled_and_of_one_size_but_for_the_last(
    samples: int, buckets: int, seed: int
) -> None:
    found = buckets_of(samples, buckets, seed)
    size = math.ceil(samples / min(samples, buckets))
    filled = Counter(found)
    assert len(found) == samples and len(filled) == math.ceil(samples / size) <= buckets
    assert all(filled[bucket] == size for bucket in range(len(filled) - 1))
    assert 1 <= filled[len(filled) - 1] <= size
    assert found == buckets_of(samples, buckets, seed)


def test_another_seed_shuffles_otherwise() -> None:
    assert buckets_of(40, 8, seed=0) != buckets_of(40, 8, seed=1)
    assert buckets_of(40, 8, seed=0) != sorted(buckets_of(40, 8, seed=0))


def test_averages_raise_the_weight_of_the_mean_by_the_size_of_a_bucket() -> None:
    """E[x' x'ᵀ] = C / b + μ μᵀ, with C the covariance of single samples."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator)
    mean = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5, -1.0])
    inputs = torch.randn(8000, 2, 6, generator=generator) @ mix + mean
    covariance, moment = (mix.T @ mix).double(), mean.double().outer(mean.double())
    for buckets, size in ((8000, 1), (1000, 8)):
        accumulator = StackOfBatch(6, buckets_of(8000, buckets, seed=0))
        accumulator.add(inputs, inputs)
        stats = accumulator.finish()
        expected = covariance / size + moment
        error = (stats.gram / stats.tokens - expected).norm() / expected.norm()
        assert float(error) < 0.05
    assert float(covariance.norm()) > 0.5 * float(moment.norm())  # else it would not show


@pytest.mark.parametrize("which", ["dense", "behind"])
@pytest.mark.parametrize("kind", ["prefix", "stack of batch"])
def test_a_value_that_is_not_finite_in_either_model_names_its_sample(which: str, kind: str) -> None:
    dense, behind = pair(4, 0)
    (dense if which == "dense" else behind)[2, 1, 0] = float("inf")
    accumulator = PrefixAccumulator(6) if kind == "prefix" else StackOfBatch(6, [0] * 14)
    with pytest.raises(NumericsError, match=r"^input is not finite at calibration sample 12$"):
        accumulator.add(dense, behind, 10)


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_the_similarity_of_a_block_is_the_mean_cosine_over_tokens(
    sizes: list[int], seed: int
) -> None:
    before, after = pair(sum(sizes), seed)
    accumulator = CosineAccumulator()
    for one, other in zip(before.split(sizes), after.split(sizes), strict=True):
        accumulator.add(one, other)
    x, y = before.double(), after.double()
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    assert accumulator.finish() == pytest.approx(float(cosine.mean()), rel=1e-12)


def test_a_block_that_changes_nothing_or_turns_everything_round() -> None:
    hidden, _ = pair(3, 0)
    for factor, expected in ((1, 1.0), (5, 1.0), (-2, -1.0)):
        accumulator = CosineAccumulator()
        accumulator.add(hidden, factor * hidden)
        assert accumulator.finish() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("width", [STRIPS_FROM - 1, STRIPS_FROM, 3 * STRIP + STRIPS_FROM + 7])
def test_the_gram_of_wide_inputs_is_the_plain_product_and_exactly_symmetric(width: int) -> None:
    inputs = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(width))
    accumulator = InputAccumulator(width)
    for batch in inputs.split(2):
        accumulator.add(batch)
    rows = inputs.reshape(-1, width).double()
    gram = accumulator.finish().gram
    assert torch.equal(gram, gram.T)
    assert torch.allclose(gram, rows.T @ rows, rtol=1e-13, atol=1e-12)
