"""Numbers in codes: packed without a gap, given back as they were, counted by their bits."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_core.coding.parts import CodedParts
from compress_core.coding.settings import Coding
from compress_core.decompose import LowRank
from compress_core.forms.codes import (
    Coded,
    coded_bits,
    groups_of,
    is_packed,
    pack_codes,
    packed_bytes,
    unpack_codes,
)
from compress_core.forms.kinds import in_codes, numbers_of, sizes_of, why_not
from compress_core.forms.names import FULL, WIDTHS
from compress_core.layer.stored import as_parts, pack_layer, put_codes, stored_weight
from tests.made_codes import coded_of, rounded

BITS = st.sampled_from(WIDTHS)
PIECES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}


def test_the_example_of_the_page_is_true() -> None:
    page = Path(__file__).parents[2] / "docs" / "model-format.md"
    (example,) = re.findall(r"```python\n([^`]*pack_codes[^`]*)```", page.read_text())
    assert example.count("assert") == 3
    exec(example, {})


def drawn(count: int, bits: int, seed: int = 0) -> Tensor:
    """Random codes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (count,), generator=generator, dtype=torch.uint8)


def by_hand(codes: list[int], bits: int) -> bytes:
    """The same bytes by whole numbers: every piece is one number, its first code the lowest."""
    found, shift = b"", 0
    for piece in PIECES[bits]:
        number = sum(
            (code >> shift) % 2**piece << piece * place for place, code in enumerate(codes)
        )
        found += number.to_bytes(-(-piece * len(codes) // 8), "little")
        shift += piece
    return found


@given(count=st.integers(0, 200), bits=BITS, seed=st.integers(0, 1000))
def test_codes_come_back_and_lie_as_is_said(count: int, bits: int, seed: int) -> None:
    codes = drawn(count, bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype is torch.uint8 and packed.shape == (packed_bytes(count, bits),)
    assert bytes(packed.tolist()) == by_hand(codes.tolist(), bits)
    assert torch.equal(unpack_codes(packed, count, bits), codes)
    assert bits * count / 8 <= len(packed) < bits * count / 8 + len(PIECES[bits])


@given(count=st.integers(1, 20), bits=BITS, seed=st.integers(0, 1000))
def test_bits_behind_the_end_are_seen_and_no_others(count: int, bits: int, seed: int) -> None:
    packed = pack_codes(drawn(count, bits, seed), bits)
    assert is_packed(packed, count, bits)
    for byte in range(len(packed)):
        for bit in range(8):
            changed = packed.clone()
            changed[byte] ^= 1 << bit
            again = pack_codes(unpack_codes(changed, count, bits), bits)
            assert is_packed(changed, count, bits) == torch.equal(again, changed)


@given(
    rows=st.integers(1, 6),
    length=st.integers(1, 40),
    bits=BITS,
    group=st.integers(1, 50),
    seed=st.integers(0, 1000),
    trained=st.booleans(),
)
def test_a_number_is_its_groups_scale_times_code_minus_zero(
    rows: int, length: int, bits: int, group: int, seed: int, trained: bool
) -> None:
    groups = groups_of(length, group)
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(rows, groups, generator=generator, dtype=torch.float64)
    codes = drawn(rows * length, bits, seed).view(rows, length)
    zeros = drawn(rows * groups, bits, seed + 1).view(rows, groups)
    found = Coded(scales.requires_grad_(trained), codes, zeros).decoded(group)
    gradient = torch.zeros(rows, groups, dtype=torch.float64)
    for row in range(rows):
        for place in range(length):
            of = row, place // group
            steps = int(codes[row, place]) - int(zeros[of])
            assert float(found[row, place].detach()) == float(scales[of].detach()) * steps
            gradient[of] += steps
    if trained:
        found.sum().backward()
        assert scales.grad is not None
        torch.testing.assert_close(scales.grad, gradient)
    bits_taken = (
        8 * (len(pack_codes(codes, bits)) + len(pack_codes(zeros, bits))) + 16 * groups * rows
    )
    assert coded_bits(rows, length, bits, group) == bits_taken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_are_exact_in_every_dtype_and_numbers_are_rounded_once(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None].expand(3, -1)
    zeros = torch.tensor([[0], [128], [255]], dtype=torch.uint8)
    scales = torch.tensor([[0.3], [1.7], [-0.01]]).to(dtype)
    found = Coded(scales, codes, zeros).decoded(256)
    wide = Coded(scales.double(), codes, zeros).decoded(256)
    assert found.dtype is dtype and torch.equal(found, wide.to(dtype))


FORMS = st.sampled_from(["plain", "pivot"])
SIDES = st.integers(4, 30)


@given(
    form=FORMS,
    out=SIDES,
    inputs=SIDES,
    bits=st.sampled_from((*WIDTHS, FULL)),
    group=st.integers(1, 40),
)
def test_a_rank_takes_more_room_than_one_less(
    form: str, out: int, inputs: int, bits: int, group: int
) -> None:
    """But for whole bytes: near full rank pivots add a code or two, and two ends may round less."""
    before = 0
    for rank in range(1, min(out, inputs) + 1):
        plain = {"rank": rank} | ({"pivot": True} if form == "pivot" else {})
        sizes = sizes_of(out, inputs, plain)
        entry = in_codes(plain, sizes, bits, group)
        assert (entry == plain) == (bits == FULL)
        here = numbers_of(entry, sizes)
        assert here > before - (3 if form == "pivot" else 0)
        before = here


@pytest.mark.parametrize("bits", [*WIDTHS, FULL])
def test_a_base_takes_its_bits_and_what_its_groups_take(bits: int) -> None:
    """16 bits of scale and one zero for a group of 32: 4 bits are 4.625 in all."""
    plain = {"rank": 0, "base": True}
    sizes = sizes_of(64, 96, plain)
    entry = in_codes(plain, sizes, bits, 32)
    each = bits + (16 + bits) / 32 if bits != FULL else FULL
    assert numbers_of(entry, sizes) * 16 == each * 64 * 96
    assert (why_not(entry, sizes) is None) == (bits != FULL)


def content(base: bool = True) -> LowRank:
    """A layer of (20, 14)."""
    generator = torch.Generator().manual_seed(1)
    u, v, whole = (
        torch.randn(shape, generator=generator) for shape in ((20, 3), (3, 14), (20, 14))
    )
    return LowRank(u, v, base=whole if base else None)


def test_what_is_packed_with_codes_is_known_by_its_record() -> None:
    low = content()
    tensors, entry = as_parts(low, torch.bfloat16)
    sizes, bits = sizes_of(20, 14, entry), {"base": 3, "factor_in": 8}
    coded = coded_of(tensors, entry, sizes, bits, 8)
    others = {name: tensor for name, tensor in tensors.items() if name not in coded}
    coding = Coding(0, 8, widths=tuple(bits.items()))
    parts = CodedParts(coded, others, entry, low, coding)
    kept = pack_layer(parts, torch.bfloat16, 280, own=True)
    says = {"rank": 3, "base": True, "codes": bits, "group": 8}
    assert kept.attrs["entry"] == says and kept.attrs["numbers"] == numbers_of(says, sizes)
    assert kept.tensors["base"].dtype is torch.bfloat16 and kept.tensors["base"].shape == (20, 2)
    weight = stored_weight(kept)
    assert weight is not None
    off = (weight.float() - low.dense()).norm() / low.dense().norm()
    assert 0 < float(off) < 0.1


def test_codes_that_do_not_fit_are_refused() -> None:
    tensors, entry = as_parts(content(), torch.float32)
    sizes = sizes_of(20, 14, entry)
    base = {"base": rounded(tensors["base"], 4, 8)}
    for coded, bits, group, message in (
        (base, {"base": 3}, 8, "base has codes or zeros of more than 3 bits"),
        (base, {"base": 4}, 7, r"base \(20, 14\) in groups of 7, not"),
        (base, {"base": 7}, 8, "base is in codes of 7 bits"),
        (base, {}, 8, "base is in codes of None bits"),
        ({"hoops": base["base"]}, {"hoops": 4}, 8, "stores no hoops"),
    ):
        if group == 7:
            coded = {"base": rounded(tensors["base"], 4, 14)}
        with pytest.raises(ValueError, match=message):
            put_codes(tensors, entry, sizes, coded, bits, group, torch.float32)
    with pytest.raises(ValueError, match="shares another one's in-factor holds nothing in codes"):
        pack_layer(CodedParts(base, {}, entry, content(), Coding(4)), torch.float32, 280, own=False)
