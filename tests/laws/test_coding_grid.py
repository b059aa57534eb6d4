"""Scales, zeros and nearest codes: how far off, what is exact, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_core.coding.grid import Grid, decoded, grid_of, nearest, spread
from compress_core.coding.settings import FULL, Coding
from compress_core.errors import ConfigError, NumericsError
from compress_core.forms.codes import groups_of
from compress_core.forms.names import WIDTHS
from tests.made_up import SEEDS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 40))
GROUPS = st.integers(1, 12)
SHIFTS = st.sampled_from([0.0, 3.0, -3.0])  # numbers of both signs, and of mostly one


def drawn(shape: tuple[int, int], seed: int, shift: float = 0.0) -> Tensor:
    """Numbers in rows of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(*shape, generator=generator, dtype=torch.float64) + shift
    return matrix * torch.logspace(-2, 1, shape[0], dtype=torch.float64)[:, None]


@given(SHAPES, GROUPS, st.sampled_from(WIDTHS), st.sampled_from(DTYPES), SEEDS, SHIFTS)
def test_a_nearest_code_is_off_by_at_most_half_a_scale(
    shape: tuple[int, int], group: int, bits: int, dtype: torch.dtype, seed: int, shift: float
) -> None:
    matrix = drawn(shape, seed, shift)
    coded = nearest(matrix, bits, group, dtype)
    assert coded.scales.dtype is dtype and bool((coded.scales > 0).all())
    assert coded.scales.shape == coded.zeros.shape == (shape[0], groups_of(shape[1], group))
    assert coded.codes.dtype is coded.zeros.dtype is torch.uint8
    assert int(max(coded.codes.max(), coded.zeros.max())) < 2**bits
    scale, _ = spread(Grid(coded.scales, coded.zeros), shape[1], group)
    off = (decoded(coded, group) - matrix).abs()
    assert bool((off <= scale * (0.5 + 1e-9)).all())


@given(SHAPES, st.sampled_from(WIDTHS), st.sampled_from(DTYPES), SEEDS, SHIFTS)
def test_a_scale_is_the_least_of_its_dtype_whose_codes_span_the_group(
    shape: tuple[int, int], bits: int, dtype: torch.dtype, seed: int, shift: float
) -> None:
    matrix = drawn((shape[0], shape[1] + 1), seed, shift)
    scales = grid_of(matrix, bits, shape[1] + 1, dtype).scales[:, 0].to(torch.float64)
    ends = matrix.amax(1).clamp_min(0) - matrix.amin(1).clamp_max(0)
    span = ends / (2**bits - 1)
    assert bool((scales >= span).all())
    step = torch.finfo(dtype).eps * span.clamp_min(float(torch.finfo(dtype).tiny))
    assert bool((scales - span < step * (1 + 1e-6)).all())


@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.3125, -7.5, 1024.0]), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from(WIDTHS),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_groups_of_one_number_throughout_are_exact(
    values: list[float], group: int, bits: int, dtype: torch.dtype, search: bool
) -> None:
    row = torch.tensor(values, dtype=torch.float64).repeat_interleave(group)
    row = row[: len(row) - group // 2]  # the last group may be short
    matrix = torch.stack([row, -row])
    weight = torch.ones_like(row) if search else None
    coded = nearest(matrix, bits, group, dtype, weight)
    assert torch.equal(decoded(coded, group), matrix)
    assert bool(coded.scales.isfinite().all())


@given(st.sampled_from(WIDTHS), st.sampled_from(DTYPES), SEEDS)
def test_numbers_that_are_codes_already_stay_what_they_are(
    bits: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (4, 16), generator=generator)
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1  # both ends are used
    zeros = torch.randint(0, 2**bits, (4, 1), generator=generator)
    coded = nearest((codes - zeros) * 0.25, bits, 16, dtype)
    assert torch.equal(coded.codes, codes.to(torch.uint8))
    assert torch.equal(coded.zeros, zeros.to(torch.uint8))
    assert bool((coded.scales == 0.25).all())


@given(SHAPES, GROUPS, st.sampled_from(WIDTHS), SEEDS)
def test_a_search_never_adds_to_the_weighted_error_of_any_group(
    shape: tuple[int, int], group: int, bits: int, seed: int
) -> None:
    matrix = drawn(shape, seed)
    weight = drawn((1, shape[1]), seed + 1)[0].abs()
    plain, searched = (
        (decoded(nearest(matrix, bits, group, torch.bfloat16, given), group) - matrix).square()
        * weight
        for given in (None, weight)
    )
    for before, after in zip(plain.split(group, 1), searched.split(group, 1), strict=True):
        assert bool((after.sum(1) <= before.sum(1) * (1 + 1e-12)).all())


def test_a_search_draws_ends_in_where_one_number_is_far_out() -> None:
    matrix = torch.linspace(-1, 1, 32, dtype=torch.float64)[None].clone()
    matrix[0, 5] = 3.0
    errors = [
        float((decoded(nearest(matrix, 2, 32, torch.float32, weight), 32) - matrix).square().sum())
        for weight in (None, torch.ones(32, dtype=torch.float64))
    ]
    assert errors[1] < 0.8 * errors[0]


def test_tiny_numbers_stay_finite_in_every_dtype() -> None:
    matrix = torch.tensor([[1e-30, -2e-30, 0, 1e-30], [0, 0, 0, 0]], dtype=torch.float64)
    for dtype in DTYPES:
        found = decoded(nearest(matrix, 4, 2, dtype), 2)
        assert float((found - matrix).abs().max()) <= 2e-30


def test_numbers_that_no_scale_reaches_are_refused() -> None:
    matrix = torch.ones(2, 4, dtype=torch.float64)
    matrix[1, 2] = 1e9
    with pytest.raises(
        NumericsError, match=r"a matrix \(2, 4\) has a number that is not finite or"
    ):
        nearest(matrix, 4, 4, torch.float16)
    for odd in (float("nan"), float("inf")):
        matrix[1, 2] = odd
        with pytest.raises(NumericsError, match="store it in a wider dtype"):
            nearest(matrix, 4, 4, torch.float64)


def test_settings_of_a_coding_are_checked() -> None:
    for message, wrong in {
        "bits are 16, or 8, 6, 5, 4, 3, 2 for codes; got 7": {"bits": 7},
        "bits are 16, or 8, 6, 5, 4, 3, 2 for codes; got 16": {"bits": FULL},
        "pivot_in can be in codes of 8, 6, 5, 4, 3, 2 bits or in 16: got 7": {
            "widths": (("pivot_in", 7),)
        },
        "code_group is at least 1 number, got 0": {"group": 0},
        "option 'rounding' of codes must be one of gptq, nearest; got 'up'": {"rounding": "up"},
        "damping, a part of the mean of H, is 0 or more; got -1": {"damping": -1.0},
    }.items():
        with pytest.raises(ConfigError, match=message):
            Coding(**wrong)  # type: ignore[arg-type]


def test_a_slot_has_the_bits_of_all_or_its_own() -> None:
    coding = Coding(4, widths=(("base", 3), ("weight", FULL)))
    assert [coding.bits_of(slot) for slot in ("base", "weight", "factor_in")] == [3, FULL, 4]
    assert coding.at(2).bits_of("factor_in") == 2 and coding.at(2).bits_of("base") == 3
    with pytest.raises(ConfigError, match="how many bits the codes of pivot_in have: give bits"):
        Coding().bits_of("pivot_in")
    assert Coding(4).reads_inputs and not Coding(4, rounding="nearest").reads_inputs
