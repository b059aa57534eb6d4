"""The Fisher information of layers' outputs: enumerated labels, and the literal formula."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compress_core.errors import ModelError, NumericsError, TextError
from compress_core.hf import output_gradients
from compress_core.hf.output_gradients import draw_labels, output_fisher, uniforms
from compress_core.learn import loop
from compress_core.types import LayerRef, ModelLayout
from tests.contracts.test_fisher import open_model
from tests.families import token_batch

TOKENS = token_batch(rows=2, length=10)


def measured(
    model: Any, layout: ModelLayout, tokens: Tensor = TOKENS, **changes: Any
) -> dict[str, Tensor]:
    """Σ g gᵀ of every layer."""
    asked: dict[str, Any] = {
        "layers": layout.layers,
        "labels": "sampled",
        "seed": 3,
        "products": torch.float64,
    }
    asked |= changes
    layers = asked.pop("layers")
    found = output_fisher(model, layout, layers, tokens, device="cpu", **asked)
    assert all(fisher.tokens == tokens.numel() for fisher in found.values())
    return {name: fisher.gram for name, fisher in found.items()}


def literal(
    model: Any, layout: ModelLayout, tokens: Tensor, labels: str = "sampled"
) -> dict[str, Tensor]:
    """The formula, by the whole model's own logits and loss, all parameters differentiated."""
    outputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(layer.name).register_forward_hook(
            lambda _, __, output, name=layer.name: outputs.__setitem__(name, output)
        )
        for layer in layout.layers
    ]
    sums = {x.name: torch.zeros(x.out_features, x.out_features).double() for x in layout.layers}
    for window, drawn in zip(tokens, uniforms(tuple(tokens.shape), 3), strict=True):
        log_p = model(input_ids=window[None]).logits[0].log_softmax(-1)
        if labels == "sampled":
            chosen = output_gradients.draw_labels(log_p.detach().exp(), drawn)
            loss = -log_p.gather(1, chosen[:, None]).sum()
        else:
            loss = -log_p[:-1].gather(1, window[1:, None]).sum()
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            rows = gradient.double().flatten(0, -2)
            sums[name] += rows.T @ rows
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize(
    "family", ["llama_tied", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt", "phi3"]
)
@pytest.mark.parametrize("labels", ["sampled", "text"])
def test_the_literal_formula(family: str, labels: str, tmp_path: Path) -> None:
    model, layout = open_model(family, tmp_path, torch.float64)
    expected = literal(model, layout, TOKENS, labels)
    found = measured(model, layout, labels=labels)
    assert list(found) == [layer.name for layer in layout.layers]
    for name, gram in found.items():
        torch.testing.assert_close(gram, expected[name], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(gram, gram.T, rtol=0, atol=0)


def tiny() -> tuple[Any, list[LayerRef], ModelLayout]:
    """A Llama of one block over five words, in float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).double().eval()
    names = ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    layers = []
    for name in (f"model.layers.0.{name}" for name in names):
        out, into = model.get_submodule(name).weight.shape
        layers.append(LayerRef(name, 0, out, into, name))
    parts: dict[str, Any] = {"block_parameters": ((),), "block_buffers": ((),)}
    layout = ModelLayout(
        "LlamaForCausalLM", "LlamaModel", "model", ("model.layers.0",), tuple(layers), "float64",
        outer_parameters=(), outer_buffers=(), output_lengths=(0,), **parts,
    )  # fmt: skip
    return model, layers, layout


def test_it_is_the_exact_fisher_information_and_the_second_derivative_of_the_divergence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Labels in the proportion of their probabilities, against their enumeration; one token."""
    model, layers, layout = tiny()
    draws, token = 400, torch.tensor([[2]])
    monkeypatch.setattr(
        output_gradients,
        "uniforms",
        lambda shape, seed: ((torch.arange(draws) + 0.5) / draws).double()[:, None],
    )
    found = measured(model, layout, token.expand(draws, 1))
    log_p = model(input_ids=token).logits[0, 0].log_softmax(-1).detach()
    for layer in layers:
        kept: list[Tensor] = []
        module = model.get_submodule(layer.name)
        handle = module.register_forward_hook(lambda _, x, y, kept=kept: kept.extend((x[0], y)))
        log_q = model(input_ids=token).logits[0, 0].log_softmax(-1)
        handle.remove()
        x, output = kept
        exact = torch.zeros(layer.out_features, layer.out_features).double()
        for label in range(5):
            (g,) = torch.autograd.grad(-log_q[label], output, retain_graph=True)
            exact += log_p[label].exp() * g[0].T @ g[0]
        fisher = found[layer.name] / draws
        torch.testing.assert_close(fisher, exact, rtol=0, atol=0.02 * float(exact.abs().max()))

        error = 1e-3 * torch.randn(module.weight.shape, dtype=torch.float64)
        predicted = torch.trace(fisher @ error @ x[0].T @ x[0] @ error.T) / 2
        with torch.no_grad():
            module.weight += error
            moved = model(input_ids=token).logits[0, 0].log_softmax(-1)
            module.weight -= error
        divergence = float((log_p.exp() * (log_p - moved)).sum())
        assert float(predicted.detach()) == pytest.approx(divergence, rel=0.05)


def test_labels_come_in_proportion_to_their_probabilities() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = (torch.arange(1000).double() + 0.5) / 1000
    labels = draw_labels(p.expand(1000, 6), drawn)
    assert torch.bincount(labels, minlength=6).tolist() == [0, 500, 0, 300, 200, 0]


@pytest.mark.parametrize("elements", [1, 200])
def test_pieces_and_blocks_that_run_again_change_nothing(
    elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layout = open_model("llama", tmp_path, torch.float64)
    whole = measured(model, layout)
    monkeypatch.setattr("compress_core.head.PIECE_ELEMENTS", elements)
    monkeypatch.setattr(output_gradients, "DRAWN_ELEMENTS", elements)
    monkeypatch.setattr(loop, "CHECKPOINTED_BYTES", 0)
    for name, gram in measured(model, layout).items():
        torch.testing.assert_close(gram, whole[name], rtol=1e-9, atol=1e-12)


def test_the_layers_of_some_blocks_get_what_they_get_among_all(tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)
    whole = measured(model, layout)
    for block in range(2):
        for name, gram in measured(model, layout, layers=layout.of_block(block)).items():
            assert torch.equal(gram, whole[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_keep_float64_sums(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same labels: a probability that is rounded can draw another one."""

    def by_number(p: Tensor, drawn: Tensor) -> Tensor:
        return (drawn * p.shape[1]).long()

    monkeypatch.setattr(output_gradients, "draw_labels", by_number)
    model, layout = open_model("llama", tmp_path, dtype)
    found = measured(model, layout, products=torch.float32)
    exact = literal(model.double(), layout, TOKENS)
    for name, gram in found.items():
        assert gram.dtype is torch.float64
        assert (gram - exact[name]).norm() / exact[name].norm() < 0.1


def test_seeds_draw_other_labels_and_the_same_seed_the_same(tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)
    first, again, other = (measured(model, layout, seed=seed) for seed in (3, 3, 4))
    for name, gram in first.items():
        assert torch.equal(gram, again[name]) and not torch.equal(gram, other[name])


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, layout = open_model("gpt2", tmp_path)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        measured(model, layout)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_no_weight_gets_a_gradient_meanwhile(tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)
    seen: list[bool] = []

    def progress(done: int, total: int) -> None:
        seen.append(any(p.requires_grad or p.grad is not None for p in model.parameters()))
        assert (done, total) == (len(seen), len(TOKENS))

    measured(model, layout, progress=progress)
    assert seen == [False] * len(TOKENS)


def test_a_gradient_that_is_not_finite_names_layer_and_window(tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)
    calls = 0

    def spoil(_: Any, __: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            output.register_hook(lambda gradient: gradient * torch.inf)

    model.get_submodule("model.layers.1.mlp.act_fn").register_forward_hook(spoil)
    with pytest.raises(NumericsError, match=r"gradient of layer .*gate_proj's output in window 1"):
        measured(model, layout)
    assert not any(name for name, p in model.named_parameters() if not p.requires_grad)


def test_logits_that_are_not_finite_name_the_window(tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[int(TOKENS[0, 4])] = torch.nan
    with pytest.raises(NumericsError, match="the logits of window 0 are not finite"):
        measured(model, layout)


def test_a_layer_that_nothing_depends_on_is_refused(tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    with pytest.raises(ModelError, match=r"do not depend on layer \S+1\.mlp\.gate_proj"):
        measured(model, layout)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3,)])
def test_no_windows_are_refused(shape: tuple[int], tmp_path: Path) -> None:
    model, layout = open_model("llama", tmp_path)
    with pytest.raises(TextError, match="windows have shape"):
        measured(model, layout, torch.ones(shape, dtype=torch.long))
