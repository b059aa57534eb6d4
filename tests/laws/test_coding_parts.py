"""Whole layers in codes: what is stored stands for what is said, and fitting never adds error."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_core.coding.error import output_error
from compress_core.coding.evened import even_turn, evened
from compress_core.coding.gptq import Swept, gptq
from compress_core.coding.grid import decoded, nearest
from compress_core.coding.parts import CodedParts, code_layer
from compress_core.coding.product import fitted_product, nearest_product, shape_of
from compress_core.coding.settings import FULL, Coding
from compress_core.decompose import LowRank, project
from compress_core.errors import ConfigError, NumericsError
from compress_core.forms.entries import Entries
from compress_core.forms.factors import Factors
from compress_core.forms.names import EIGHT_BITS
from compress_core.forms.part import Sizes
from compress_core.forms.pivot import Pivot
from compress_core.metric import SecondMoment
from compress_core.prune.obs import damped, upper_factor
from compress_core.sparse import Sparse
from tests.made_up import SEEDS, weight_and_inputs

BFLOAT, WIDE = torch.bfloat16, torch.float64
SIDES = st.integers(3, 16)
FORMS = ["plain", "pivot"]
KINDS: dict[str, Any] = {"plain": Factors, "pivot": Pivot}
SLOTS = ("sparse_values", "columns", "base", "weight", "factor_in", "pivot_in")
GROUP = 4


def made(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and a second moment."""
    weight, inputs, _ = weight_and_inputs((rows, columns), 4 * columns, seed)
    return weight, inputs.T @ inputs / len(inputs)


def cut(weight: Tensor, moment: Tensor, rank: int) -> LowRank:
    return LowRank(*project(weight, SecondMoment(moment), rank)[:2])


def all_parts(seed: int, rank: int = 3) -> tuple[LowRank, Tensor]:
    """A layer of a product, columns, entries, a base and a bias, and its second moment."""
    weight, moment = made(10, 14, seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=WIDE)

    index = torch.tensor([2, 7, 11])
    entries = Sparse.of(3 * normal(10, 14), normal(10, 14) > 1.2)
    u, v = normal(10, rank), normal(rank, 11)
    return LowRank(u, v, normal(10, 3), index, entries, normal(10), 0.1 * weight), moment


def file_of(parts: CodedParts, group: int = GROUP) -> dict[str, Tensor]:
    """What every slot stands for, as its kind reads it."""
    tensors = {slot: tensor for slot, tensor in parts.tensors.items()}
    for slot, codes in parts.codes.items():
        numbers = decoded(codes, group)
        across = slot == "columns" or (slot == "weight" and not parts.entry.get("pivot"))
        tensors[slot] = numbers[0] if slot == "sparse_values" else numbers.T if across else numbers
    return tensors


@pytest.mark.parametrize("whole", [(), SLOTS[:3], SLOTS[3:], SLOTS])
@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_stored_stands_for_the_sum_that_is_said(
    form: str, rounding: str, whole: tuple[str, ...], seed: int
) -> None:
    """With any slots in 16 bits, as the model stores them."""
    low, moment = all_parts(seed)
    coding = Coding(4, GROUP, rounding, widths=tuple((slot, FULL) for slot in whole))
    parts = code_layer(low, moment if coding.reads_inputs else None, coding, form, BFLOAT)
    assert not set(parts.codes) & set(whole)
    tensors, sizes = file_of(parts), Sizes(10, 14, 3)
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    found = Entries.dense(tensors, sizes) + tensors["base"]
    taken = low.index
    assert taken is not None and low.sparse is not None
    rest = [j for j in range(14) if j not in taken.tolist()]
    found[:, taken] += tensors["columns"]
    found[:, rest] += KINDS[form].dense(tensors, sizes)
    torch.testing.assert_close(found, parts.low.dense())
    assert parts.low.bias is low.bias
    says: dict[str, Any] = {"columns": 3, "nonzeros": low.sparse.nonzeros, "base": True, "rank": 3}
    assert parts.entry == says | ({"pivot": True} if form == "pivot" else {})
    assert all(codes.scales.dtype is BFLOAT for codes in parts.codes.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_parts_that_are_fitted_to_one_another_have_less_error_than_each_by_itself(
    form: str, seed: int
) -> None:
    low, moment = all_parts(seed)
    errors = []
    for coding in (Coding(3, GROUP), Coding(3, GROUP, "nearest")):
        found = code_layer(low, moment, coding, form, BFLOAT).low.dense()
        errors.append(output_error(low.dense() - found, moment))
    assert errors[0] < errors[1]


@given(SIDES, SIDES, SEEDS, st.sampled_from(FORMS), st.sampled_from([2, 3, 4, 8]))
def test_an_out_factor_that_is_fitted_to_a_rounded_in_factor_never_adds_error(
    rows: int, columns: int, seed: int, form: str, bits: int
) -> None:
    """Only the in-factor is rounded; then the other is the best there is for it."""
    weight, moment = made(rows, columns, seed)
    rank = 1 + seed % (min(rows, columns) - 1)
    low = cut(weight, moment, rank)
    coding = Coding(bits, GROUP, widths=(("weight", FULL),))
    shape = shape_of(KINDS[form], low.u, low.v, moment, coding.damping)
    swept = Swept.of(moment, coding)
    rounded = decoded(gptq(shape.inner, swept, coding, WIDE), GROUP)
    before = output_error(weight - shape.whole(shape.outer) @ rounded, moment)
    found = fitted_product(shape, weight, moment, swept, coding, WIDE)
    after = output_error(weight - found.u @ found.v, moment)
    assert after <= before * (1 + 1e-7)


@given(SIDES, SIDES, SEEDS, st.sampled_from(FORMS))
def test_numbers_that_stay_as_they_are_lose_nothing(
    rows: int, columns: int, seed: int, form: str
) -> None:
    weight, moment = made(rows, columns, seed)
    low = cut(weight, moment, 1 + seed % min(rows, columns))
    wide = Coding(4, widths=tuple((s, FULL) for s in ("weight", "factor_in", "pivot_in")))
    parts = code_layer(low, moment, wide, form, WIDE)
    assert not parts.codes and all(bool(t.isfinite().all()) for t in parts.tensors.values())
    torch.testing.assert_close(parts.low.dense(), low.dense(), rtol=1e-6, atol=1e-6)


def test_by_the_nearest_codes_every_slot_is_what_a_form_stores_rounded() -> None:
    low, _ = all_parts(1)
    coding = Coding(5, GROUP, "nearest")
    for form, along in (("plain", 0), ("pivot", 1)):
        parts = code_layer(low, None, coding, form, BFLOAT)
        stored = KINDS[form].pack(low.u, low.v, WIDE)
        lines = stored["weight"].T if along == 0 else stored["weight"]
        assert low.sparse is not None and low.columns is not None and low.base is not None
        expected = {
            "weight": lines,
            "factor_in" if form == "plain" else "pivot_in": list(stored.values())[1],
            "columns": low.columns.T,
            "sparse_values": low.sparse.values[None],
            "base": low.base,
        }
        assert parts.codes.keys() == expected.keys()
        for slot, matrix in expected.items():
            assert torch.equal(parts.codes[slot].codes, nearest(matrix, 5, GROUP, BFLOAT).codes)
        product = nearest_product(shape_of(KINDS[form], low.u, low.v, None, 0.0), coding, BFLOAT)
        torch.testing.assert_close(product.u @ product.v, parts.low.u @ parts.low.v)


def test_a_base_alone_is_rounded_by_gptq() -> None:
    weight, moment = made(9, 12, 0)
    low = LowRank(weight.new_zeros(9, 0), weight.new_zeros(0, 12), base=weight)
    coding = Coding(4, GROUP, order=True)
    parts = code_layer(low, moment, coding, "pivot", BFLOAT)
    expected = gptq(weight, Swept.of(moment, coding), coding, BFLOAT)
    assert torch.equal(parts.codes["base"].codes, expected.codes) and len(parts.codes) == 1
    assert {name: tuple(t.shape) for name, t in parts.tensors.items()} == {
        "weight": (9, 0),
        "factor_in": (0, 12),
    }
    assert parts.entry == {"rank": 0, "base": True}


@pytest.mark.parametrize("seed", range(3))
def test_a_product_beside_rounded_columns_is_the_best_for_what_they_leave(seed: int) -> None:
    """With factors that stay as they are it is that of least squares over all inputs."""
    low, moment = all_parts(seed)
    low = replace(low, sparse=None, base=None)
    coding = Coding(2, GROUP, widths=(("weight", FULL), ("factor_in", FULL)))
    target = low.dense()
    parts = code_layer(low, moment, coding, "plain", WIDE)
    error = output_error(target - parts.low.dense(), moment)
    left = replace(parts.low, u=low.u, v=low.v).dense()
    assert error < output_error(target - left, moment)
    rest = [j for j in range(14) if j not in (2, 7, 11)]
    slope = (target - parts.low.dense()) @ moment[:, rest]
    # Of a best product neither factor has a direction in which to fall.
    assert float((slope @ parts.low.v.T).abs().max()) < 1e-6
    assert float((parts.low.u.T @ slope).abs().max()) < 1e-6


def test_another_weight_can_be_what_a_product_is_fitted_to() -> None:
    weight, moment = made(12, 16, 0)
    low = cut(weight, moment, 5)
    own, dense = (
        code_layer(low, moment, Coding(2, GROUP), "pivot", BFLOAT, toward).low.dense()
        for toward in (None, weight)
    )
    assert output_error(weight - dense, moment) < output_error(weight - own, moment)
    assert output_error(low.dense() - own, moment) < output_error(low.dense() - dense, moment)


def test_what_cannot_be_coded_is_refused_in_one_line() -> None:
    weight, moment = made(6, 8, 0)
    low = cut(weight, moment, 2)
    with pytest.raises(ConfigError, match="give calibration text, or rounding=nearest"):
        code_layer(low, None, Coding(4), "plain", BFLOAT)
    with pytest.raises(ConfigError, match="how many bits the codes of factor_in have"):
        code_layer(low, moment, Coding(), "plain", BFLOAT)
    with pytest.raises(ConfigError, match="factors in 8 bits are stored in one way only"):
        code_layer(low, moment, Coding(4), EIGHT_BITS, BFLOAT)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=24))
def test_an_even_turn_is_one_and_leaves_each_input_as_much_as_any_other(
    energies: list[float],
) -> None:
    energy = torch.tensor(energies, dtype=WIDE)
    turn = even_turn(energy)
    torch.testing.assert_close(turn.T @ turn, torch.eye(len(energy), dtype=WIDE))
    inner = turn.T @ torch.diag(energy) @ turn
    left = upper_factor((inner + inner.T) / 2, 0).diagonal().square()
    mean = energy.log().mean().exp()
    torch.testing.assert_close(left, mean.expand(len(energy)), rtol=1e-4, atol=0)


@given(SIDES, SIDES, SEEDS)
def test_an_evened_product_is_the_same_product(rows: int, columns: int, seed: int) -> None:
    weight, moment = made(rows, columns, seed)
    low = cut(weight, moment, 1 + seed % min(rows, columns))
    stretched = low.u * torch.logspace(-2, 2, low.rank, dtype=WIDE)
    u, v = evened(stretched, low.v, moment, 0.01)
    torch.testing.assert_close(u @ v, stretched @ low.v)
    torch.testing.assert_close(u.T @ u, torch.eye(low.rank, dtype=WIDE))
    inner = damped(SecondMoment(moment).output_gram(v), 0.01)
    left = upper_factor(inner, 0.01).diagonal()
    assert float(left.max()) == pytest.approx(float(left.min()), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_product_of_full_rank_can_be_coded(form: str) -> None:
    """In the pivot form there are then no rows beside the pivots."""
    weight, moment = made(6, 8, 0)
    found = code_layer(cut(weight, moment, 6), moment, Coding(8, GROUP), form, WIDE).low.dense()
    assert output_error(weight - found, moment) < 1e-4 * output_error(weight, moment)


def test_numbers_beyond_the_dtype_are_refused() -> None:
    weight, moment = made(6, 8, 0)
    low = cut(1e6 * weight, moment, 2)
    for widths in ((), (("factor_in", FULL),)):
        with pytest.raises(NumericsError, match=r"beyond torch.float16: .*in a wider dtype"):
            code_layer(low, moment, Coding(2, widths=widths), "plain", torch.float16)


def test_a_product_of_nothing_can_be_evened_and_coded() -> None:
    weight, moment = made(6, 8, 0)
    low = LowRank(weight.new_zeros(6, 2), weight.new_zeros(2, 8))
    for form in FORMS:
        found = code_layer(low, moment, Coding(4, GROUP), form, BFLOAT).low.dense()
        assert torch.equal(found, torch.zeros(6, 8, dtype=WIDE))
