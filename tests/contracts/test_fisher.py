"""Fisher information by columns: the literal formula, and a model that is left as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress_core.errors import NumericsError, TextError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.fisher import fisher_columns
from compress_core.hf.layout import inspect_model
from compress_core.hf.loading import load_model
from compress_core.types import ModelLayout
from tests.contracts.streams import save
from tests.families import token_batch

TOKENS = token_batch(rows=3, length=10)


def open_model(
    family: str, folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[Any, ModelLayout]:
    save(family, folder, dtype)
    return load_model(folder), inspect_model(Checkpoint(folder))


def literal(model: Any, layout: ModelLayout, tokens: Tensor) -> dict[str, Tensor]:
    """The formula, with autograd by hand and every gradient of a window at once."""
    weights = [model.get_submodule(layer.name).weight for layer in layout.layers]
    sums = {layer.name: torch.zeros(layer.in_features).double() for layer in layout.layers}
    for window in tokens:
        log_p = model(input_ids=window[None]).logits[0, :-1].log_softmax(-1)
        loss = -log_p.gather(1, window[1:, None]).mean()
        for layer, gradient in zip(layout.layers, torch.autograd.grad(loss, weights), strict=True):
            rows = gradient.T if layer.transposed else gradient
            sums[layer.name] += rows.double().square().sum(0)
    return {name: total / len(tokens) for name, total in sums.items()}


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt"])
def test_the_literal_formula(family: str, tmp_path: Path) -> None:
    model, layout = open_model(family, tmp_path, torch.float64)
    expected = literal(model, layout, TOKENS)

    found = fisher_columns(model, layout, TOKENS, device="cpu")
    assert list(found) == [layer.name for layer in layout.layers]
    for layer in layout.layers:
        assert found[layer.name].shape == (layer.in_features,)
        assert found[layer.name].dtype is torch.float64
        assert found[layer.name].sum() > 0
        torch.testing.assert_close(found[layer.name], expected[layer.name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_keep_float64_sums(dtype: torch.dtype, tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path, dtype)

    found = fisher_columns(model, layout, TOKENS, device="cpu")
    exact = literal(model.double(), layout, TOKENS)
    for name, columns in found.items():
        assert columns.dtype is torch.float64
        error = (columns - exact[name]).norm() / exact[name].norm()
        assert error < (1e-5 if dtype is torch.float32 else 0.1)


def test_the_order_of_windows_changes_rounding_only(tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)

    found = fisher_columns(model, layout, TOKENS, device="cpu")
    turned = fisher_columns(model, layout, TOKENS.flip(0), device="cpu")
    alone = [fisher_columns(model, layout, row[None], device="cpu") for row in TOKENS]
    for name in found:
        torch.testing.assert_close(turned[name], found[name], rtol=1e-12, atol=0)
        mean = torch.stack([each[name] for each in alone]).mean(0)
        torch.testing.assert_close(mean, found[name], rtol=1e-12, atol=0)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, layout = open_model("gpt2", tmp_path)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    flags = [parameter.requires_grad for parameter in model.parameters()]

    with torch.no_grad():
        fisher_columns(model, layout, TOKENS, device="cpu")
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_one_gradient_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = open_model("llama", tmp_path)
    held: list[int] = []
    original = Tensor.double

    def double(tensor: Tensor) -> Tensor:
        held.append(sum(p.grad is not None for p in model.parameters()))
        return original(tensor)

    monkeypatch.setattr(Tensor, "double", double)
    fisher_columns(model, layout, TOKENS, device="cpu")
    assert held == [0] * len(TOKENS) * len(layout.layers)  # the one in hand is no longer held


def test_progress_counts_windows(tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)
    told: list[tuple[int, int]] = []

    fisher_columns(
        model, layout, TOKENS, device="cpu", progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_gradient_that_is_not_finite_names_layer_and_window(tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj"
    calls = 0

    def spoil(_: Any, __: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            output.register_hook(lambda gradient: gradient * torch.inf)

    handle = model.get_submodule(name).register_forward_hook(spoil)
    with pytest.raises(NumericsError, match=rf"gradient of layer {name} in window 1 is not finite"):
        fisher_columns(model, layout, TOKENS, device="cpu")
    handle.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_is_not_finite_names_the_window(tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[int(TOKENS[1, 4])] = torch.nan
    first = next(i for i, row in enumerate(TOKENS) if int(TOKENS[1, 4]) in row.tolist())

    with pytest.raises(NumericsError, match=f"the loss of window {first} is not finite"):
        fisher_columns(model, layout, TOKENS, device="cpu")


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (3,)])
def test_windows_with_nothing_to_predict_are_refused(shape: tuple[int], tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)

    with pytest.raises(TextError, match="windows have shape"):
        fisher_columns(model, layout, torch.ones(shape, dtype=torch.long), device="cpu")
