"""A weight in codes and a correction of low rank: its turns, and that coding repeats the best."""

import pytest
import torch
from torch import Tensor

from compress_core.coding.correct import correct
from compress_core.coding.error import output_error
from compress_core.coding.gptq import Swept, gptq
from compress_core.coding.grid import decoded
from compress_core.coding.parts import code_layer
from compress_core.coding.settings import FULL, Coding
from compress_core.errors import ConfigError
from tests.made_up import weight_and_inputs

WIDE = torch.float64
CODING = Coding(3, 8, widths=(("weight", FULL), ("factor_in", FULL)))


def made(seed: int) -> tuple[Tensor, Tensor]:
    weight, inputs, _ = weight_and_inputs((20, 24), 96, seed)
    return weight, inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("seed", range(4))
def test_its_first_turn_is_the_best_product_for_what_gptq_takes_away(seed: int) -> None:
    weight, moment = made(seed)
    told: list[float] = []
    low = correct(weight, moment, 4, CODING, WIDE, turns=1, told=told.append)
    assert torch.equal(low.dense(), weight)
    lost = weight - decoded(gptq(weight, Swept.of(moment, CODING), CODING, WIDE), 8)
    root = torch.linalg.cholesky(moment)
    beyond = torch.linalg.svdvals(lost @ root)[4:].square().sum()
    assert told == [pytest.approx(float(beyond))]


@pytest.mark.parametrize("seed", range(4))
def test_coding_it_repeats_the_best_of_its_turns(seed: int) -> None:
    weight, moment = made(seed)
    told: list[float] = []
    low = correct(weight, moment, 4, CODING, WIDE, turns=7, told=told.append)
    torch.testing.assert_close(low.dense(), weight)
    parts = code_layer(low, moment, CODING, "plain", WIDE)
    error = output_error(weight - parts.low.dense(), moment)
    assert len(told) == 7 and error == pytest.approx(min(told), rel=1e-5)
    assert set(parts.codes) == {"base"} and set(parts.tensors) == {"weight", "factor_in"}


def test_of_rank_zero_it_is_gptq_and_of_full_rank_nothing_is_lost() -> None:
    weight, moment = made(0)
    told: list[float] = []
    none = code_layer(correct(weight, moment, 0, CODING, WIDE), moment, CODING, "plain", WIDE)
    alone = gptq(weight, Swept.of(moment, CODING), CODING, WIDE)
    assert torch.equal(none.codes["base"].codes, alone.codes)
    correct(weight, moment, 20, CODING, WIDE, 1, told.append)
    assert told[0] < 1e-12


def test_what_it_cannot_do_is_refused_in_one_line() -> None:
    weight, moment = made(0)
    with pytest.raises(ConfigError, match="turns must be at least 1, got 0"):
        correct(weight, moment, 4, CODING, WIDE, turns=0)
    with pytest.raises(ConfigError, match=r"\(20, 24\) has no correction of rank 21"):
        correct(weight, moment, 21, CODING, WIDE)
    with pytest.raises(ConfigError, match="rounding=nearest fits nothing"):
        correct(weight, moment, 4, Coding(3, rounding="nearest"), WIDE)
