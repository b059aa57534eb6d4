"""What is not finite is found in every dtype, wherever it is."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_core import finite
from compress_core.finite import all_finite, first_bad

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.integers(1, 9), min_size=0, max_size=3)
PACKAGE = Path(finite.__file__).parents[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=SHAPES, seed=st.integers(0, 99), bad=st.sampled_from(["nan", "inf", "-inf"]))
def test_one_bad_number_anywhere_is_found(
    dtype: torch.dtype, shape: list[int], seed: int, bad: str
) -> None:
    made = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=made).to(dtype)
    assert all_finite(values)
    rows = values.reshape(-1, shape[-1] if shape else 1)
    assert first_bad(rows) is None
    at = int(torch.randint(values.numel(), (), generator=made))
    values.view(-1)[at] = float(bad)
    assert not all_finite(values)
    assert not all_finite(values.T if values.ndim == 2 else values)
    assert first_bad(rows) == at // rows.shape[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_of_a_dtype_are_finite_and_none_are_too(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert all_finite(torch.tensor([largest, -largest], dtype=dtype))
    assert all_finite(torch.empty(0, 3, dtype=dtype))


def test_a_tensor_that_is_trained_can_be_asked() -> None:
    assert all_finite(torch.ones(2, requires_grad=True))


def test_nobody_asks_in_the_slow_way() -> None:
    slow = re.compile(r"isfinite\([^()]*\)\.all\(\)|isfinite\(\)\.all\(\)")
    files = [f for part in ("compress_core", "tasks") for f in (PACKAGE / part).rglob("*.py")]
    assert len(files) > 100
    told = Path(finite.__file__)  # of what it takes the place of
    assert [f for f in files if f != told and slow.search(f.read_text(encoding="utf-8"))] == []
