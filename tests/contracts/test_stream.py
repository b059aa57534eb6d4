"""Running a model block by block gives what the whole model gives, with one block in memory."""

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress_core.errors import ModelError, NumericsError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.hf.loading import load_model
from compress_core.hf.stream import BlockStream
from compress_core.stats import InputStats
from tests.contracts.more_families import MORE, any_model
from tests.families import FAMILIES, VOCABULARY, tiny_model, token_batch

EXACT = [*FAMILIES, *MORE]
EXACT.remove("mamba")  # its convolution rounds by the layout of its input


@dataclass
class Reference:
    """What hooks on the whole model saw."""

    hidden: list[Tensor]  # output of each block
    inputs: dict[str, Tensor]  # (tokens, in) of each linear, float64


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A tiny model's folder."""
    any_model(family, dtype).save_pretrained(folder, **more)
    return folder


def open_stream(folder: Path) -> BlockStream:
    checkpoint = Checkpoint(folder)
    return BlockStream(checkpoint, inspect_model(checkpoint))


def watch_whole(folder: Path, stream: BlockStream, tokens: Tensor, batch_size: int) -> Reference:
    """Runs the whole model, loaded by transformers, with hooks on blocks and linears."""
    model = load_model(folder)
    hidden: list[list[Tensor]] = [[] for _ in stream.layout.blocks]
    inputs: dict[str, list[Tensor]] = {layer.name: [] for layer in stream.layout.layers}

    def keep_output(kept: list[Tensor]) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            kept.append(first.clone())

        return hook

    def keep_input(kept: list[Tensor]) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            kept.append(args[0].reshape(-1, args[0].shape[-1]).double())

        return hook

    for path, outputs in zip(stream.layout.blocks, hidden, strict=True):
        model.get_submodule(path).register_forward_hook(keep_output(outputs))
    for name, seen in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(keep_input(seen))
    with torch.no_grad():
        for batch in tokens.split(batch_size):
            model(input_ids=batch, use_cache=False)
    return Reference(
        [torch.cat(parts) for parts in hidden],
        {name: torch.cat(parts) for name, parts in inputs.items()},
    )


def check_against_whole(folder: Path, tokens: Tensor, batch_size: int) -> None:
    """Hidden states equal to the bit, statistics to rounding, after every block."""
    stream = open_stream(folder)
    expected = watch_whole(folder, stream, tokens, batch_size)
    hidden = stream.embed(tokens, batch_size)
    for block in range(len(stream.layout.blocks)):
        taps = stream.layout.taps(block)
        measured = stream.run_block(block, hidden, batch_size, taps=list(taps))
        assert torch.equal(hidden, expected.hidden[block])
        for tap, layers in taps.items():
            for layer in layers:
                compare_stats(measured[tap], expected.inputs[layer.name])


def compare_stats(stats: InputStats, rows: Tensor) -> None:
    assert stats.tokens == len(rows)
    torch.testing.assert_close(stats.gram, rows.T @ rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.abs_sum, rows.abs().sum(dim=0), rtol=1e-12, atol=1e-12)
    assert torch.equal(stats.gram, stats.gram.T)


@pytest.mark.parametrize("family", EXACT)
def test_streaming_equals_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path)

    check_against_whole(folder, token_batch(rows=5, length=12), batch_size=2)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("family", ["opt", "gemma2", "gpt2"])
def test_any_batch_size_will_do(family: str, batch_size: int, tmp_path: Path) -> None:
    folder = save(family, tmp_path)

    check_against_whole(folder, token_batch(rows=3, length=9), batch_size)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "phi"])
def test_bf16_checkpoints_run_in_bf16(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path, torch.bfloat16)

    stream = open_stream(folder)
    assert stream.embed(token_batch(), 2).dtype is torch.bfloat16
    check_against_whole(folder, token_batch(rows=3), batch_size=2)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_sharded_checkpoints(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path, max_shard_size="10KB")

    assert len(Checkpoint(folder).files) > 2
    check_against_whole(folder, token_batch(), batch_size=2)


def test_gpt2_saved_without_its_prefix(tmp_path: Path) -> None:
    model: Any = tiny_model("gpt2")
    model.base_model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    file.write_text(json.dumps(config))

    assert "h.0.attn.c_attn.weight" in Checkpoint(tmp_path).names
    check_against_whole(tmp_path, token_batch(), batch_size=2)


def test_a_stored_buffer_that_transformers_ignores_is_ignored(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    check_against_whole(folder, token_batch(), batch_size=2)


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
    return stream.checkpoint.key(name, stream.layout.base_prefix)


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_block_can_run_twice(family: str, tmp_path: Path) -> None:
    stream = open_stream(save(family, tmp_path))
    first = stream.embed(token_batch(), 2)
    second = first.clone()
    taps = list(stream.layout.taps(0))

    once = stream.run_block(0, first, 2, taps=taps)
    again = stream.run_block(0, second, 2, taps=taps)
    assert torch.equal(first, second)
    assert all(torch.equal(once[tap].gram, again[tap].gram) for tap in taps)


def test_only_the_taps_asked_for_are_measured(tmp_path: Path) -> None:
    stream = open_stream(save("llama", tmp_path))
    hidden = stream.embed(token_batch(), 2)
    tap = "model.layers.0.mlp.down_proj"

    assert list(stream.run_block(0, hidden, 2, taps=[tap])) == [tap]
    assert stream.run_block(1, hidden, 2) == {}


def test_progress_counts_samples(tmp_path: Path) -> None:
    stream = open_stream(save("llama", tmp_path))
    hidden = stream.embed(token_batch(rows=5), 2)
    told: list[tuple[int, int]] = []

    stream.run_block(0, hidden, 2, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_products_in_float32_differ_by_rounding_only(tmp_path: Path) -> None:
    stream = open_stream(save("llama", tmp_path))
    hidden = stream.embed(token_batch(), 2)
    tap = "model.layers.0.mlp.down_proj"

    exact = stream.run_block(0, hidden.clone(), 2, taps=[tap])[tap].gram
    quick = stream.run_block(0, hidden, 2, taps=[tap], products=torch.float32)[tap].gram
    assert quick.dtype is torch.float64
    assert 0 < float((quick - exact).norm() / exact.norm()) < 1e-6


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
