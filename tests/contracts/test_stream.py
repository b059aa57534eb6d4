"""Running a model block by block gives what the whole model gives: outputs and statistics."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.loading import load_model
from compress_core.hf.stream import BlockStream
from compress_core.stats import InputStats
from tests.contracts.more_families import MORE
from tests.contracts.streams import open_stream, save
from tests.families import FAMILIES, tiny_model, token_batch

EXACT = [*FAMILIES, *MORE]
EXACT.remove("mamba")  # its convolution rounds by the layout of its input


@dataclass
class Reference:
    """What hooks on the whole model saw."""

    hidden: list[Tensor]  # output of each block
    inputs: dict[str, Tensor]  # (tokens, in) of each linear, float64


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
