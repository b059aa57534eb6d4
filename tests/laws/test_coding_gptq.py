"""GPTQ against its formula with explicit inverses, and where it must equal rounding to nearest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_core.coding import gptq as gptq_file
from compress_core.coding.error import error_by_width, output_error
from compress_core.coding.gptq import Swept, gptq
from compress_core.coding.grid import Grid, codes_at, decoded, grid_of, nearest, spread
from compress_core.coding.settings import Coding
from compress_core.errors import NumericsError
from compress_core.forms.codes import Coded
from compress_core.forms.names import WIDTHS
from compress_core.prune.obs import damped
from tests.made_up import SEEDS, weight_and_inputs

SIDES = st.integers(1, 14)
BFLOAT = torch.bfloat16


def made(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and a second moment."""
    weight, inputs, _ = weight_and_inputs((rows, columns), 4 * columns, seed)
    return weight, inputs.T @ inputs / len(inputs)


def literal(weight: Tensor, moment: Tensor, coding: Coding, along: int) -> Tensor:
    """What the codes stand for, column by column: H_F is inverted anew for every column."""
    h, w, group = damped(moment, coding.damping), weight.clone(), coding.group
    columns = list(range(w.shape[1]))
    if coding.order:
        columns = h.diagonal().argsort(descending=True, stable=True).tolist()
    grids: dict[int, Grid] = {}
    if coding.order and along == 1:
        for first in range(0, w.shape[1], group):
            grids[first] = grid_of(w[:, first : first + group], coding.bits, group, BFLOAT)
    found = torch.zeros_like(w)
    for at, j in enumerate(columns):
        if along == 0:
            scale, zero = spread(grid_of(w[:, j][None], coding.bits, group, BFLOAT), len(w), group)
            scale, zero = scale[0], zero[0]
        else:
            first = j - j % group
            if first not in grids:
                grids[first] = grid_of(w[:, first : first + group], coding.bits, group, BFLOAT)
            scale, zero = (part[:, 0].to(torch.float64) for part in grids[first])
        found[:, j] = (codes_at(w[:, j], scale, zero, coding.bits) - zero) * scale
        later = columns[at:]
        inverse = torch.linalg.inv(h[later][:, later])
        w[:, later] -= torch.outer((w[:, j] - found[:, j]) / inverse[0, 0], inverse[0])
    return found


def value(coded: Coded, group: int, along: int) -> Tensor:
    return decoded(coded, group) if along == 1 else decoded(coded, group).T


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize(("group", "block"), [(1, 4), (3, 4), (4, 8), (5, 2), (32, 128)])
@pytest.mark.parametrize("seed", range(3))
def test_the_sweep_is_the_formula(
    group: int, block: int, along: int, order: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq_file, "BLOCK", block)
    weight, moment = made(7, 11, seed)
    coding = Coding(3, group, order=order)
    coded = gptq(weight, Swept.of(moment, coding), coding, BFLOAT, along=along)
    torch.testing.assert_close(
        value(coded, group, along), literal(weight, moment, coding, along), atol=1e-9, rtol=1e-9
    )


@given(SIDES, SIDES, SEEDS, st.integers(1, 6), st.sampled_from(WIDTHS), st.booleans())
def test_without_correlation_it_is_rounding_to_nearest(
    rows: int, columns: int, seed: int, group: int, bits: int, order: bool
) -> None:
    weight, moment = made(rows, columns, seed)
    moment, coding = torch.diag(moment.diagonal()), Coding(bits, group, order=order)
    swept = Swept.of(moment, coding)
    for along, lines in ((1, weight), (0, weight.T)):
        found = gptq(weight, swept, coding, BFLOAT, along=along)
        for one, other in zip(found, nearest(lines, bits, group, BFLOAT), strict=True):
            assert torch.equal(one, other)


@given(st.integers(2, 14), st.integers(3, 14), SEEDS, st.booleans())
def test_an_input_that_is_always_zero_takes_its_nearest_codes_and_moves_no_other(
    rows: int, columns: int, seed: int, order: bool
) -> None:
    weight, moment = made(rows, columns, seed)
    dead, alive = columns // 2, [j for j in range(columns) if j != columns // 2]
    moment[dead], moment[:, dead] = 0, 0
    coding = Coding(3, 4, order=order)
    found = gptq(weight, Swept.of(moment, coding), coding, BFLOAT, along=0)
    own = nearest(weight[:, dead][None], 3, 4, BFLOAT)
    assert torch.equal(found.codes[dead], own.codes[0])
    swept = Swept.of(moment[alive][:, alive], coding)
    others = gptq(weight[:, alive], swept, coding, BFLOAT, along=0)
    assert torch.equal(found.codes[alive], others.codes)
    assert torch.equal(found.scales[alive], others.scales)


def test_a_moment_of_nothing_is_rounding_to_nearest() -> None:
    weight, moment = made(5, 8, 0)
    coding = Coding(4, 4)
    found = gptq(weight, Swept.of(0 * moment, coding), coding, BFLOAT)
    assert torch.equal(found.codes, nearest(weight, 4, 4, BFLOAT).codes)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_it_has_less_error_than_rounding_to_nearest_and_less_with_every_bit(
    seed: int, order: bool
) -> None:
    weight, moment = made(24, 48, seed)
    coding = Coding(group=16, order=order)
    errors = error_by_width(weight, moment, coding, BFLOAT)
    assert list(errors) == list(WIDTHS) and list(errors.values()) == sorted(errors.values())
    for bits, error in errors.items():
        plain = weight - decoded(nearest(weight, bits, 16, BFLOAT), 16)
        assert error < output_error(plain, moment)


def test_error_is_that_of_outputs_and_in_nats_with_their_fisher_information() -> None:
    weight, inputs, _ = weight_and_inputs((5, 7), 40, 0)
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    moment, fisher = inputs.T @ inputs / 40, gradients.T @ gradients / 30
    outputs = inputs @ weight.T
    assert output_error(weight, moment) == pytest.approx(float(outputs.square().sum() / 40))
    nats = (outputs @ gradients.T).square().sum() / (2 * 40 * 30)
    assert output_error(weight, moment, fisher) == pytest.approx(float(nats))
    coding = Coding(group=4)
    weighed = error_by_width(weight, moment, coding, BFLOAT, fisher, widths=[3])
    codes = gptq(weight, Swept.of(moment, coding), coding.at(3), BFLOAT)
    left = weight - decoded(codes, 4)
    assert weighed == {3: pytest.approx(output_error(left, moment, fisher))}


def test_what_is_no_second_moment_or_no_number_is_refused_in_one_line() -> None:
    weight, moment = made(4, 6, 0)
    below = torch.ones(6, 6, dtype=torch.float64) - 0.1 * torch.eye(6)
    with pytest.raises(NumericsError, match="give more calibration text or more damping"):
        Swept.of(below, Coding(4, damping=0.0))
    swept = Swept.of(moment, Coding(4))
    moment[2, 3] = float("nan")
    with pytest.raises(NumericsError, match="is not finite or has a negative diagonal"):
        Swept.of(moment, Coding(4))
    weight[1, 1] = float("inf")
    with pytest.raises(NumericsError, match=r"a matrix \(4, 6\) to be rounded is not finite"):
        gptq(weight, swept, Coding(4), BFLOAT)
