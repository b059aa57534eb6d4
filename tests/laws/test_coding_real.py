"""Codes of a real model's layers: GPTQ against rounding to nearest, and products turned even."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress_core.coding.error import error_by_width, output_error
from compress_core.coding.expected import (
    Inputs,
    curve_of_codes,
    steps_squared,
    whole_cost_of_codes,
)
from compress_core.coding.gptq import Swept
from compress_core.coding.grid import decoded, nearest
from compress_core.coding.parts import code_layer
from compress_core.coding.product import fitted_product, shape_of
from compress_core.coding.settings import Coding
from compress_core.decompose import LowRank, project
from compress_core.forms.factors import Factors
from compress_core.metric import SecondMoment

Layers = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def layers(shared: Path) -> Layers:
    """Weight and second moment of the inputs, of every layer of a real Llama's outer blocks."""
    from transformers import LlamaForCausalLM

    from compress_core.hf.text import evaluation_windows, load_tokenizer, read_documents

    folder = shared / "models" / "babyllama-1m"
    documents = read_documents(str(shared / "data" / "tinystories" / "train_head.txt")).texts
    windows = evaluation_windows(documents, load_tokenizer(folder), length=256, windows=8)
    model, found = LlamaForCausalLM.from_pretrained(folder), {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        rows = inputs[0].flatten(0, -2).double()
        assert isinstance(module, nn.Linear)
        found[name] = (module.weight.detach().double(), rows.T @ rows / len(rows))

    for place in (0, len(model.model.layers) - 1):
        for name, module in model.model.layers[place].named_modules(prefix=str(place)):
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda m, x, name=name: note(m, x, name))
    with torch.no_grad():
        model(torch.as_tensor(windows))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("order", [False, True])
def test_of_every_layer_gptq_has_less_error_than_rounding_to_nearest(
    layers: Layers, order: bool
) -> None:
    for weight, moment in layers.values():
        errors = error_by_width(weight, moment, Coding(order=order), torch.bfloat16)
        assert list(errors.values()) == sorted(errors.values())
        for bits in (2, 3, 4):
            plain = weight - decoded(nearest(weight, bits, 32, torch.bfloat16), 32)
            assert errors[bits] < output_error(plain, moment)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.6, 1.1), (4, 0.6, 1.1), (2, 0.9, 1.5)])
def test_of_every_layer_gptq_costs_about_what_is_expected(
    layers: Layers, bits: int, least: float, most: float
) -> None:
    """Less where few inputs are damped; more at 2 bits, where numbers leave their groups' ends."""
    for weight, moment in layers.values():
        fisher = torch.eye(len(weight), dtype=torch.float64)
        expected = whole_cost_of_codes(weight, Inputs(moment), fisher, 32) / steps_squared(bits)
        real = error_by_width(weight, moment, Coding(), torch.bfloat16, fisher, [bits])[bits]
        assert least < real / expected < most


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "pivot"])
def test_products_in_codes_cost_less_than_is_expected(layers: Layers, form: str) -> None:
    """What fits each factor to the other as it was rounded is not in the expectation."""
    for weight, moment in layers.values():
        fisher = torch.eye(len(weight), dtype=torch.float64)
        u, v, _ = project(weight, SecondMoment(moment), min(weight.shape) // 2)
        found = code_layer(LowRank(u, v), moment, Coding(4), form, torch.bfloat16).low
        real = output_error(u @ v - found.u @ found.v, moment, fisher)
        expected = curve_of_codes(u, v, Inputs(moment), fisher, form, 32)[-1] / steps_squared(4)
        assert 0.15 < real / expected < 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_products_that_are_turned_even_lose_far_less_to_codes(layers: Layers, bits: int) -> None:
    coding, losses = Coding(bits), [0.0, 0.0]
    for weight, moment in layers.values():
        u, v, _ = project(weight, SecondMoment(moment), min(weight.shape) // 2)
        swept, target = Swept.of(moment, coding), u @ v
        for place, by in enumerate((moment, None)):
            shape = shape_of(Factors, u, v, by, coding.damping)
            found = fitted_product(shape, target, moment, swept, coding, torch.bfloat16)
            error = output_error(target - found.u @ found.v, moment)
            losses[place] += error / output_error(target, moment)
    assert losses[0] < 0.6 * losses[1]
