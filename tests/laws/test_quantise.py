"""Factors in 8 bits: how far off they are, what they count as, and that scales cost nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.forms.kinds import dense_of, sizes_of
from compress_core.forms.names import EIGHT_BITS
from compress_core.layer.stored import as_parts
from compress_core.quantise import LARGEST, Codes, quantise, widen_codes
from compress_core.types import LayerRef

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, 9))


def drawn(shape: tuple[int, int, int], seed: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors whose components differ in size."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns, rank = shape
    u = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    v = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return u * 10 ** torch.linspace(-1, 1, rank), size * v * 3 ** torch.linspace(1, -1, rank)[
        :, None
    ]


@given(shape=SHAPES, seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES))
def test_a_code_is_off_by_at_most_half_a_step(
    shape: tuple[int, int, int], seed: int, dtype: torch.dtype
) -> None:
    u, v = drawn(shape, seed)
    codes, eps = quantise(u, v, dtype), torch.finfo(dtype).eps
    assert codes.codes_out.dtype is codes.codes_in.dtype is torch.int8
    assert codes.scale.dtype is dtype and bool((codes.scale > 0).all())
    found_u, found_v = codes.factors(torch.float64)
    peak_u, peak_v = u.abs().amax(0), v.abs().amax(1)
    scale = peak_u * 128 / LARGEST  # of U, which `factors` leaves in V
    small = min(shape[:2])
    step = 1 / (2 * LARGEST)
    off_u = (found_u * scale - u).abs() / peak_u
    off_v = ((found_v / scale[:, None]) - v).abs() / peak_v[:, None]
    assert bool((off_u[:small] <= step * (1 + 1e-9)).all())
    assert bool((off_v[:, :small] <= step * (1 + 3 * eps) + 1e-12).all())
    for rest in (off_u[small:], off_v[:, small:]):
        assert bool((rest <= eps + 1e-15).all())


@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_a_component_counts_as_the_longer_side_and_its_scale(
    shape: tuple[int, int, int], seed: int
) -> None:
    rows, columns, rank = shape
    codes = quantise(*drawn(shape, seed), torch.bfloat16)
    assert codes.numbers == rank * (max(rows, columns) + 1)
    parts = [codes.scale, codes.codes_out, codes.codes_in, codes.rest_out, codes.rest_in]
    assert 2 * codes.numbers == sum(part.nbytes for part in parts if part is not None)
    layer = LayerRef("x", 0, rows, columns, "x", form=EIGHT_BITS)
    assert layer.atom_cost * rank == codes.numbers
    assert layer.paying_rank == min(rows, columns) - 1  # all but the last
    assert (codes.rest_out is None) == (rows <= columns)
    assert (codes.rest_in is None) == (columns <= rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_product_is_near_in_every_dtype(dtype: torch.dtype, size: float) -> None:
    u, v = drawn((40, 60, 12), 1, size)
    tensors, entry = as_parts(LowRank(u, v), dtype, EIGHT_BITS)
    assert entry == {"rank": 12, "bits": 8}
    found = dense_of(entry, tensors, sizes_of(40, 60, entry))
    error = (found.double() - u @ v).norm() / (u @ v).norm()
    assert 1e-3 < float(error) < 1e-2


def test_codes_are_coded_as_themselves_and_all_values_are_exact_in_16_bits() -> None:
    codes = quantise(*drawn((9, 14, 5), 2), torch.float32)
    again = quantise(*codes.factors(torch.float64), torch.float32)
    assert torch.equal(codes.codes_out, again.codes_out)
    assert torch.equal(codes.codes_in, again.codes_in)
    every = torch.arange(-LARGEST, LARGEST + 1, dtype=torch.int8)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(widen_codes(every, dtype).double(), widen_codes(every, torch.float64))


def test_zeros_and_tiny_numbers_stay_finite() -> None:
    u, v = drawn((6, 9, 4), 3)
    u[:, 0], v[1], v[2] = 0, 0, v[2] * 1e-30
    for dtype in DTYPES:
        codes: Codes = quantise(u, v, dtype)
        product = torch.matmul(*codes.factors(torch.float64))
        assert bool(product.isfinite().all())
        want = u[:, 3:] @ v[3:]
        assert float((product - want).norm() / want.norm()) < 0.01
