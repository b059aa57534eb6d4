"""Codes of a real model's layers: GPTQ against rounding to nearest, and products turned even."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress_core.coding.error import error_by_width, output_error
from compress_core.coding.gptq import Swept
from compress_core.coding.grid import decoded, nearest
from compress_core.coding.product import fitted_product, shape_of
from compress_core.coding.settings import Coding
from compress_core.decompose import project
from compress_core.forms.factors import Factors
from compress_core.metric import SecondMoment

Layers = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def layers(shared: Path) -> Layers:
    """Weight and second moment of the inputs, of every layer of a real Llama."""
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

    for name, module in model.model.layers.named_modules():
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
