"""The head on pieces is the model's own, and nothing as large as a window's logits is ever made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from compress_core import head
from compress_core.errors import ModelError, NumericsError
from compress_core.gradients import token_loss
from compress_core.head import Halves
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.fisher import fisher_columns
from compress_core.hf.layout import inspect_model
from compress_core.hf.probe import KlProbe
from compress_core.learn.loop import Training
from compress_core.learn.teacher import teach
from compress_core.learn.worth import mean_loss
from compress_core.recover.loss import Objective
from tests.contracts.more_families import MORE, any_model
from tests.families import FAMILIES, VOCABULARY, token_batch
from tests.whole import perplexity_and_kl

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALED: dict[str, Callable[[], Any]] = {
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.3),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=7.0),
    "gemma2_hard": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=16, final_logit_softcapping=0.5
    ),
}
HEADS = ["llama", "llama_tied", "gemma2_hard", "cohere", "granite", "phi", "gpt_neox"]
TOKENS = token_batch(rows=3, length=11)


def model_of(family: str) -> Any:
    if family not in SCALED:
        return any_model(family)
    torch.manual_seed(0)
    return _drawn_wide(transformers.AutoModelForCausalLM.from_config(SCALED[family]()).eval())


def _drawn_wide(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows at a time."""
    monkeypatch.setattr(head, "PIECE_ELEMENTS", 5 * VOCABULARY)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE, *SCALED])
@torch.no_grad()
def test_pieces_are_the_models_own_logits(family: str, small_pieces: None) -> None:
    model = model_of(family)
    halves = Halves(model)
    rows = halves.hidden(TOKENS).flatten(0, 1)

    pieces = halves.pieces(len(rows))
    assert [piece.stop - piece.start for piece in pieces] == [5] * 6 + [3]
    found = torch.cat([halves.logits(rows[piece]) for piece in pieces])
    expected = model(input_ids=TOKENS, use_cache=False).logits.flatten(0, 1)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    again = model(input_ids=TOKENS, use_cache=False).logits.flatten(0, 1)
    assert torch.equal(again, expected)  # the model is as it was


@torch.no_grad()
def test_what_the_heads_add_shows() -> None:
    """Or the comparison above would pass without biases, caps and scales."""
    for family in ("phi", "gemma2_hard", "cohere", "granite"):
        model = model_of(family)
        hidden = Halves(model).hidden(TOKENS)
        bare = functional.linear(hidden, model.get_output_embeddings().weight)
        assert not torch.allclose(bare, model(input_ids=TOKENS).logits, atol=1e-2), family


@pytest.mark.parametrize("family", HEADS)
def test_gradients_by_piece_are_the_whole_ones(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family).double()
    names = [name for name, _ in model.named_parameters()]

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))

    logits = model(input_ids=TOKENS, use_cache=False).logits[:, :-1].flatten(0, 1)
    whole = functional.cross_entropy(logits, TOKENS[:, 1:].flatten())
    expected = gradients(whole)
    monkeypatch.setattr(head, "PIECE_ELEMENTS", 4 * VOCABULARY)
    loss = token_loss(model, TOKENS)

    torch.testing.assert_close(loss, whole)
    for name, found, truth in zip(names, gradients(loss), expected, strict=True):
        torch.testing.assert_close(found, truth, msg=name)
    assert any(truth.any() for truth in expected)


def test_pieces_hold_whole_tiles_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = Halves(any_model("llama"))
    for elements, rows in ((1, 1), (15, 15), (16, 16), (100, 96)):
        monkeypatch.setattr(head, "PIECE_ELEMENTS", elements * VOCABULARY)
        assert {piece.stop - piece.start for piece in halves.pieces(10 * rows)} == {rows}


def test_a_model_that_goes_past_its_base_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = any_model("llama")
    halves = Halves(model)
    rows = halves.hidden(TOKENS).flatten(0, 1)
    other = any_model("llama").model
    whole = type(model).forward

    def past(self: Any, **given: Any) -> Any:
        own, self.model = self.model, other
        try:
            return whole(self, **given)
        finally:
            self.model = own

    monkeypatch.setattr(type(model), "forward", past)
    with pytest.raises(ModelError, match="LlamaForCausalLM does not make its logits of its base"):
        halves.logits(rows)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        found = output if isinstance(output, tuple | list) else [output]
        for tensor in found:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


LENGTH, WIDE = 60, 512  # a window's logits are more than any weight or activation of the model


def wide_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": WIDE, "hidden_size": 16})
    return _drawn_wide(transformers.AutoModelForCausalLM.from_config(config).eval())


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Any, Any, Tensor]:
    """A model, its layout, and windows."""
    model = wide_llama()
    model.save_pretrained(tmp_path)
    windows = torch.randint(3, WIDE, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    return model, inspect_model(Checkpoint(tmp_path)), windows


def evaluates(model: Any, layout: Any, windows: Tensor) -> None:
    perplexity_and_kl(model, windows, reference=wide_llama(), batch_size=2)


def teaches(model: Any, layout: Any, windows: Tensor) -> None:
    teach(model, windows, 8, batch_size=2, device="cpu")


def takes_fisher_information(model: Any, layout: Any, windows: Tensor) -> None:
    fisher_columns(model, layout, windows, device="cpu")


def probes(model: Any, layout: Any, windows: Tensor) -> None:
    probe = KlProbe(model, layout, windows, batch_size=2, device="cpu")
    layer = layout.layers[0]
    probe.measure({layer.name: torch.zeros(layer.out_features, layer.in_features)})


def weighs_masks(model: Any, layout: Any, windows: Tensor) -> None:
    mean_loss(model, windows, "cpu")


def recovers(model: Any, layout: Any, windows: Tensor) -> None:
    taught = teach(model, windows, 8, batch_size=2, device="cpu")
    training = Training(windows, "cpu", batch_size=2, seed=0)
    Objective(model, layout, taught, training, 0.2, 2).descend(torch.tensor([0, 2]), 0)


@pytest.mark.parametrize(
    "work", [evaluates, teaches, takes_fisher_information, probes, weighs_masks, recovers]
)
def test_no_tensor_is_as_large_as_the_logits_of_a_window(
    work: Callable[..., None], wide: tuple[Any, Any, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Largest()
    with whole:
        work(*wide)
    assert whole.elements >= (LENGTH - 1) * WIDE  # the watch would see them

    monkeypatch.setattr(head, "PIECE_ELEMENTS", 16 * WIDE)
    pieces = Largest()
    with pieces:
        work(*wide)
    assert pieces.elements < (LENGTH - 1) * WIDE


def test_probabilities_that_are_not_kept_change_no_result(
    wide: tuple[Any, Any, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layout, windows = wide
    monkeypatch.setattr(head, "PIECE_ELEMENTS", 32 * WIDE)
    layer = layout.layers[0]
    change = {layer.name: torch.zeros(layer.out_features, layer.in_features)}
    found = []
    for kept in (1 << 28, 5 * 32 * WIDE * 4 // 2, 0):  # all, some, none
        monkeypatch.setattr("compress_core.hf.probe.KEPT_BYTES", kept)
        probe = KlProbe(model, layout, windows, batch_size=2, device="cpu")
        found.append(probe.measure(change))
    assert found[0] > 1e-6
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-3)


def test_the_teacher_names_the_window_whose_logits_are_not_finite(
    wide: tuple[Any, Any, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, windows = wide
    windows = windows.clamp(min=4)
    windows[3, 7] = 3
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.nan
    for elements in (head.PIECE_ELEMENTS, 16 * WIDE):
        monkeypatch.setattr(head, "PIECE_ELEMENTS", elements)
        with pytest.raises(NumericsError, match="not finite in window 3"):
            teach(model, windows, 8, batch_size=2, device="cpu")
