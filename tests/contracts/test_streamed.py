"""Evaluation block by block finds what the whole models show, dense and compressed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress_core.decompose import LowRank
from compress_core.errors import ModelError
from compress_core.evaluate import TextMetrics, perplexity_and_kl
from compress_core.folder.stream import CompressedStream
from compress_core.folder.write import CompressedWeights
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.hf.loading import load_model
from compress_core.hf.states import Room
from compress_core.hf.stream import BlockStream
from compress_core.hf.streamed import Streamed
from compress_core.types import ModelLayout
from tests import whole
from tests.contracts.more_families import any_model
from tests.contracts.test_folder_stream import wide_layers
from tests.contracts.test_head import SCALED, model_of
from tests.families import linear_names, tiny_model, token_batch
from tests.pipeline.contents import (
    coded_layers,
    sparse_layers,
    stores,
    summed_layers,
    varied_layers,
)
from tests.pipeline.folders import Pair, edit_config, make_pair, without

TOKENS = token_batch(rows=5, length=11)
BATCH = 2  # the last is smaller
SMALL = Room(most=0)  # every hidden state goes to disk


def by_block(
    pair: Pair,
    layout: ModelLayout | None = None,
    dtype: str | None = None,
    room: Room | None = None,
    small: Path | None = None,
) -> TextMetrics:
    checkpoint = Checkpoint(pair.dense)
    dense = BlockStream(checkpoint, inspect_model(checkpoint), dtype=dtype, room=room)
    compressed = CompressedStream(small or pair.small, layout, dtype=dtype, room=room)
    models = [Streamed(stream, TOKENS, BATCH) for stream in (compressed, dense)]
    return perplexity_and_kl(models[0], TOKENS, reference=models[1], batch_size=BATCH)


def in_memory(pair: Pair, dtype: str = "auto", small: Path | None = None) -> TextMetrics:
    dense, model = (load_model(folder, dtype=dtype) for folder in (pair.dense, small or pair.small))
    return whole.perplexity_and_kl(model, TOKENS, reference=dense, batch_size=BATCH)


def layout_of(pair: Pair) -> ModelLayout:
    return inspect_model(Checkpoint(pair.dense))


def expect_same(pair: Pair) -> None:
    """To the bit, whether the folder's layout is known or looked for, and where states lie."""
    expected = in_memory(pair)
    assert expected.kl is not None and expected.kl > 1e-6
    assert by_block(pair, layout_of(pair)) == expected
    assert by_block(pair, room=SMALL) == expected


# What the blocks of every family give out is told by test_folder_stream; these differ at the head.
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "opt", "phi"])
def test_metrics_are_those_of_the_whole_models(family: str, tmp_path: Path) -> None:
    expect_same(make_pair(tiny_model(family), tmp_path, layers=varied_layers))


@pytest.mark.parametrize("family", ["bloom", "qwen3_5", *SCALED])
def test_odd_blocks_and_heads_too(family: str, tmp_path: Path) -> None:
    expect_same(make_pair(model_of(family), tmp_path, layers=wide_layers))


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", sparse_layers), ("gpt2", summed_layers), ("gpt2", coded_layers)],
)
def test_and_with_every_kind_of_part(
    family: str, layers: Callable[..., Any], tmp_path: Path
) -> None:
    expect_same(make_pair(tiny_model(family), tmp_path, layers=layers))


def test_whatever_the_keys_and_dtypes_in_the_files(tmp_path: Path) -> None:
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    pair = make_pair(model, tmp_path, prefixless=True, layers=varied_layers)
    assert by_block(pair, layout_of(pair), "float32") == in_memory(pair, "float32")
    assert by_block(pair) == in_memory(pair)


def test_the_folders_own_tensors_outside_layers_are_read(tmp_path: Path) -> None:
    """Norms that a recovery trained, and what else may differ from the dense model."""
    pair = make_pair(tiny_model("llama"), tmp_path, layers=varied_layers)
    names = ("model.layers.1.input_layernorm.weight", "model.norm.weight", "lm_head.weight")
    stored = load_file(pair.small / "model.safetensors")
    found = [in_memory(pair)]
    for place, name in enumerate(names):
        other = without(pair.small, tmp_path / str(place), **{name: stored[name] * 1.5})
        found.append(in_memory(pair, small=other))
        assert by_block(pair, layout_of(pair), small=other) == found[-1]
    assert len({metrics.nll for metrics in found}) == len(found)


def test_a_folder_without_compressed_layers_is_the_dense_model(tmp_path: Path) -> None:
    pair = make_pair(tiny_model("opt"), tmp_path, layers=lambda model: [])
    found = by_block(pair)
    assert found.kl == 0.0 and found == in_memory(pair)


def test_another_batch_changes_rounding_only(tmp_path: Path) -> None:
    pair = make_pair(tiny_model("gemma2"), tmp_path, layers=varied_layers)
    stream = CompressedStream(pair.small)
    found = perplexity_and_kl(Streamed(stream, TOKENS, 3), TOKENS, batch_size=5)
    assert found.nll == pytest.approx(in_memory(pair).nll, rel=1e-6)


def test_no_more_than_one_block_is_ever_loaded(tmp_path: Path) -> None:
    pair = make_pair(tiny_model("llama"), tmp_path, layers=varied_layers)
    stream = CompressedStream(pair.small)
    found = []

    def loaded() -> int:
        blocks = stream._blocks
        return sum(any(not p.is_meta for p in block.parameters()) for block in blocks)

    model = Streamed(stream, TOKENS, BATCH, progress=lambda *_: found.append(loaded()))
    perplexity_and_kl(model, TOKENS, batch_size=BATCH)
    assert set(found) == {1} and loaded() == 0


def test_progress_counts_windows_in_blocks(tmp_path: Path) -> None:
    any_model("llama").save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    told: list[tuple[int, int]] = []
    stream = BlockStream(checkpoint, inspect_model(checkpoint))
    Streamed(stream, TOKENS, BATCH, progress=lambda done, of: told.append((done, of)))
    assert told == [(done, 10) for done in (2, 4, 5, 7, 9, 10)]


def test_a_folder_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    pair = make_pair(tiny_model("llama"), tmp_path, layers=varied_layers)
    settings = Checkpoint(pair.small, compressed=True).config["quantization_config"]
    edit_config(pair.small, quantization_config=settings | {"format_version": 99})
    with pytest.raises(ModelError, match="format 99"):
        CompressedStream(pair.small)
    modules = settings["modules"] | {"model.layers.7.mlp.up_proj": {"rank": 2}}
    edit_config(pair.small, quantization_config=settings | {"modules": modules})
    with pytest.raises(ModelError, match=r"no layer 'model\.layers\.7\.mlp\.up_proj'"):
        CompressedStream(pair.small)


def test_a_shared_factor_of_another_block_is_read_where_it_is(tmp_path: Path) -> None:
    model = tiny_model("llama")
    names = [name for name in linear_names(model) if name.endswith("q_proj")]

    def shared(model: Any) -> list[CompressedWeights]:
        torch.manual_seed(1)
        factor = torch.randn(6, 32) / 6
        low = [LowRank(torch.randn(32, 6), factor) for _ in names]
        first = stores(names[0], low[0])
        return [first, stores(names[1], low[1], shared_with=names[0])]

    expect_same(make_pair(model, tmp_path, layers=shared))


def test_states_on_disk_leave_no_file(tmp_path: Path) -> None:
    room = Room(most=10, folder=tmp_path)
    small, large = room.empty((2,), torch.float32), room.empty((3, 4), torch.bfloat16)
    large.fill_(2.0)
    assert room.copy(large).sum() == 24.0 and small.shape == (2,)
    assert list(tmp_path.iterdir()) == []
    assert (room.held(10), room.held(11), Room().held(11)) == (10, 0, 11)
