"""A weight in codes and a correction of low rank: its turns, the best of which is stored."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress_core.coding.correct import code_by_turns
from compress_core.coding.error import output_error
from compress_core.coding.gptq import Swept, gptq
from compress_core.coding.grid import decoded
from compress_core.coding.parts import CodedParts, code_layer
from compress_core.coding.settings import FULL, Coding
from compress_core.coding.whole import of_whole
from compress_core.decompose import project
from compress_core.errors import ConfigError
from compress_core.metric import SecondMoment
from tests.made_up import weight_and_inputs

WIDE = torch.float64
PLAIN = Coding(3, 8, widths=(("weight", FULL), ("factor_in", FULL)))
CODED = Coding(2, 8, widths=(("weight", 4), ("factor_in", 4), ("pivot_in", 4)))


def made(seed: int) -> tuple[Tensor, Tensor]:
    weight, inputs, _ = weight_and_inputs((20, 24), 96, seed)
    return weight, inputs.T @ inputs / len(inputs)


def of_turns(
    seed: int, coding: Coding, turns: int, form: str = "plain"
) -> tuple[CodedParts, float]:
    """What is stored, and the error of that."""
    weight, moment = made(seed)
    parts = code_by_turns(of_whole(weight, 4), moment, replace(coding, turns=turns), form, WIDE)
    return parts, output_error(weight - parts.low.dense(), moment)


@pytest.mark.parametrize("seed", range(4))
def test_one_turn_is_the_closed_form_of_eora(seed: int) -> None:
    """The difference of W and its codes, projected onto its best directions behind the inputs."""
    weight, moment = made(seed)
    base = decoded(gptq(weight, Swept.of(moment, PLAIN), PLAIN, WIDE), 8)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.sqrt()
    u, s, vt = torch.linalg.svd((weight - base) @ root, full_matrices=False)
    product = (u[:, :4] * s[:4]) @ vt[:4] @ torch.linalg.inv(root)
    parts, error = of_turns(seed, PLAIN, 1)
    assert parts.low.base is not None and torch.equal(parts.low.base, base)
    torch.testing.assert_close(parts.low.u @ parts.low.v, product, rtol=1e-5, atol=1e-6)
    assert error == pytest.approx(float(s[4:].square().sum()), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_stored_is_the_best_of_the_turns_of_the_paper(seed: int) -> None:
    """Four of the turns go on from EoRA's, three from the best product for the weight itself."""
    weight, moment = made(seed)
    u, v, _ = project(weight, SecondMoment(moment), 4)
    errors = []
    for product, turns in ((torch.zeros_like(weight), 4), (u @ v, 3)):
        for _ in range(turns):
            base = decoded(gptq(weight - product, Swept.of(moment, PLAIN), PLAIN, WIDE), 8)
            u, v, _ = project(weight - base, SecondMoment(moment), 4)
            product = u @ v
            errors.append(output_error(weight - base - product, moment))
    parts, error = of_turns(seed, PLAIN, 7)
    assert error == pytest.approx(min(errors), rel=1e-5) and error < errors[0]
    assert set(parts.codes) == {"base"} and set(parts.tensors) == {"weight", "factor_in"}


@pytest.mark.parametrize("form", ["plain", "pivot"])
@pytest.mark.parametrize("seed", range(4))
def test_more_turns_have_no_more_error_with_factors_in_codes_too(seed: int, form: str) -> None:
    errors = [of_turns(seed, CODED, turns, form)[1] for turns in (1, 2, 4, 12)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    parts, _ = of_turns(seed, CODED, 4, form)
    slots = {"base", "weight", "factor_in" if form == "plain" else "pivot_in"}
    assert set(parts.codes) == slots
    assert {slot: int(x.codes.max()) < 4 for slot, x in parts.codes.items()} == {
        slot: slot == "base" for slot in slots
    }


def test_of_rank_zero_it_is_gptq_and_of_full_rank_nothing_is_lost() -> None:
    weight, moment = made(0)
    none = code_by_turns(of_whole(weight), moment, replace(PLAIN, turns=5), "plain", WIDE)
    alone = gptq(weight, Swept.of(moment, PLAIN), PLAIN, WIDE)
    assert torch.equal(none.codes["base"].codes, alone.codes)
    whole = code_by_turns(of_whole(weight, 20), moment, PLAIN, "plain", WIDE)
    assert output_error(weight - whole.low.dense(), moment) < 1e-12


def test_where_there_is_no_base_turns_change_nothing() -> None:
    weight, moment = made(0)
    u, v, _ = project(weight, SecondMoment(moment), 4)
    low = replace(of_whole(weight), u=u, v=v, base=None)
    one, other = (
        code_by_turns(low, moment, replace(CODED, turns=5), "plain", WIDE),
        code_layer(low, moment, CODED, "plain", WIDE),
    )
    assert torch.equal(one.low.dense(), other.low.dense())


def test_what_it_cannot_do_is_refused_in_one_line() -> None:
    weight, moment = made(0)
    with pytest.raises(ConfigError, match="turns must be at least 1, got 0"):
        replace(PLAIN, turns=0)
    coding = Coding(3, rounding="nearest", turns=2)
    with pytest.raises(ConfigError, match="rounding=nearest fits nothing: leave out turns=2"):
        code_by_turns(of_whole(weight, 4), moment, coding, "plain", WIDE)
