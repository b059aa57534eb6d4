"""One block's weights in memory, values that are not finite, and models that cannot be streamed."""

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress_core.errors import ModelError, NumericsError
from compress_core.hf.stream import BlockStream
from tests.contracts.streams import open_stream, save
from tests.families import VOCABULARY, token_batch


def real_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.device.type != "meta")


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_one_block_is_in_memory(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(save(family, tmp_path))
    tokens = token_batch()
    hidden = stream.embed(tokens, 2)
    blocks = stream._blocks
    outside = sum(stream.checkpoint.read(_key(stream, n)).numel() for n in _outer(stream))
    held: list[list[int]] = []
    original = type(blocks[0]).forward

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        held.append([real_parameters(block) for block in blocks])
        return original(module, *args, **kwargs)

    monkeypatch.setattr(type(blocks[0]), "forward", forward)
    for block in range(len(blocks)):
        stream.run_block(block, hidden, 2)

    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    assert held == [[sizes[0], 0], [0, sizes[1]]]
    assert [real_parameters(block) for block in blocks] == [0, 0]
    assert real_parameters(stream.model) == outside


def _outer(stream: BlockStream) -> tuple[str, ...]:
    return stream.layout.outer_parameters


def _key(stream: BlockStream, name: str) -> str:
    return stream.layout.stored[name]


def test_weights_are_gone_after_an_error(tmp_path: Path) -> None:
    stream = open_stream(save("llama", tmp_path))
    hidden = stream.embed(token_batch(), 2)
    hidden[0, 0, 0] = torch.nan

    with pytest.raises(NumericsError):
        stream.run_block(0, hidden, 2, taps=list(stream.layout.taps(0)))
    assert real_parameters(stream._blocks[0]) == 0


def test_no_hidden_states_are_held_per_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(save("llama", tmp_path))
    made: list[weakref.ref[Tensor]] = []
    embedding = type(stream.model.get_input_embeddings())
    original = embedding.forward

    def forward(module: nn.Module, tokens: Tensor) -> Tensor:
        output = original(module, tokens)
        made.append(weakref.ref(output))
        return output

    monkeypatch.setattr(embedding, "forward", forward)
    stream.embed(token_batch(rows=5), 2)

    assert made and all(output() is None for output in made)


@pytest.mark.parametrize("sample", [0, 2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_value_that_is_not_finite_names_layer_and_sample(
    family: str, sample: int, tmp_path: Path
) -> None:
    stream = open_stream(save(family, tmp_path))
    hidden = stream.embed(token_batch(rows=5), 2)
    stream.run_block(0, hidden, 2)
    hidden[sample, 7, 3] = torch.inf
    taps = list(stream.layout.taps(1))

    with pytest.raises(NumericsError, match=rf"^layer {taps[0]}: .* sample {sample}$"):
        stream.run_block(1, hidden, 2, taps=taps)


def test_a_value_that_overflows_inside_a_block_names_the_layer(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][5] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stream = open_stream(folder)
    hidden = stream.embed(token_batch(), 2)

    with pytest.raises(NumericsError, match=r"^layer model\.layers\.0\.mlp\.down_proj: .*sample 0"):
        stream.run_block(0, hidden, 2, taps=list(stream.layout.taps(0)))


def test_blocks_that_read_the_tokens_are_refused(tmp_path: Path) -> None:
    config = transformers.Gemma3nTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    with pytest.raises(ModelError, match="read more of the tokens than their hidden states"):
        open_stream(tmp_path).embed(token_batch(), 2)


def llama_that(
    change: Callable[[Any, Tensor, Any], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> BlockStream:
    """A Llama whose model runs its blocks as ``change`` says."""
    stream = open_stream(save("llama", tmp_path))

    def forward(module: Any, input_ids: Tensor, **_: Any) -> Any:
        hidden = module.embed_tokens(input_ids)
        rotary = module.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        return change(module.layers, hidden, rotary)

    monkeypatch.setattr(type(stream.model.base_model), "forward", forward)
    return stream


def test_work_between_blocks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(layers: Any, hidden: Tensor, rotary: Any) -> Tensor:
        for layer in layers:
            hidden = layer(hidden, position_embeddings=rotary) * 2
        return hidden

    with pytest.raises(ModelError, match="changes hidden states between its blocks"):
        llama_that(scaled, tmp_path, monkeypatch).embed(token_batch(), 2)


def test_work_in_place_between_blocks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(layers: Any, hidden: Tensor, rotary: Any) -> Tensor:
        for layer in layers:
            hidden = layer(hidden, position_embeddings=rotary)
            hidden *= 2
        return hidden

    with pytest.raises(ModelError, match="changes hidden states between its blocks"):
        llama_that(scaled, tmp_path, monkeypatch).embed(token_batch(), 2)


RAISED = [
    KeyError("rope"),
    AttributeError("'NoneType' object has no attribute 'shape'"),
    ValueError("not enough values to unpack (expected 2, got 1)"),
    IndexError("index out of range in self"),
    NotImplementedError(),
    AssertionError(),
    TypeError("forward() missing 1 required positional argument\nand more"),
]


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_a_model_raises_is_one_line_with_its_place(
    raised: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise raised

    said = (str(raised) or type(raised).__name__).splitlines()[0]
    line = re.escape(f"{type(raised).__name__}: {said}") + "$"
    stream = open_stream(save("llama", tmp_path))
    hidden = stream.embed(token_batch(), 2)
    monkeypatch.setattr(type(stream._blocks[0]), "forward", fail)
    in_block = r"^LlamaForCausalLM fails in model\.layers\.1: " + line
    with pytest.raises(ModelError, match=in_block) as told:
        stream.run_block(1, hidden, 2)
    assert told.value.__cause__ is raised
    with pytest.raises(ModelError, match="^LlamaForCausalLM cannot be followed without.*" + line):
        open_stream(tmp_path)
    monkeypatch.setattr(type(stream.model.base_model), "forward", fail)
    with pytest.raises(ModelError, match="^LlamaForCausalLM cannot be run block by block: " + line):
        stream.embed(token_batch(), 2)


def test_lack_of_memory_is_not_blamed_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    stream = open_stream(save("llama", tmp_path))
    monkeypatch.setattr(type(stream.model.base_model), "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        stream.embed(token_batch(), 2)


@pytest.mark.parametrize("order", [[0, 1, 0, 1], [1, 0], [0]])
def test_blocks_run_other_than_in_order_are_refused(
    order: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walk(layers: Any, hidden: Tensor, rotary: Any) -> Tensor:
        for index in order:
            hidden = layers[index](hidden, position_embeddings=rotary)
        return hidden

    with pytest.raises(ModelError, match="does not run each of its blocks once and in order"):
        llama_that(walk, tmp_path, monkeypatch).embed(token_batch(), 2)


def test_a_model_may_ask_its_blocks_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(layers: Any, hidden: Tensor, rotary: Any) -> Tensor:
        for layer in layers:
            assert layer.self_attn.layer_idx in (0, 1)
            with pytest.raises(AttributeError, match="colour"):
                _ = layer.colour
            hidden = layer(hidden, position_embeddings=rotary)
        return hidden

    assert llama_that(ask, tmp_path, monkeypatch).embed(token_batch(), 2).shape == (2, 12, 32)
