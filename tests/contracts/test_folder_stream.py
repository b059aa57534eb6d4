"""A compressed folder block by block gives what the whole model does, beside the dense one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_core.decompose import LowRank
from compress_core.errors import ModelError
from compress_core.folder.stream import FolderStream
from compress_core.folder.write import CompressedWeights
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.hf.loading import load_model
from tests.contracts.more_families import MORE, any_model
from tests.families import FAMILIES, linear_names, tiny_model, token_batch
from tests.pipeline.contents import (
    eight_bit_layers,
    sizes_of_layer,
    sparse_layers,
    stores,
    summed_layers,
    varied_layers,
)
from tests.pipeline.folders import Pair, edit_config, make_pair

TOKENS = token_batch(rows=3, length=9)


def open_folder(pair: Pair, **how: Any) -> FolderStream:
    checkpoint = Checkpoint(pair.dense)
    return FolderStream(checkpoint, inspect_model(checkpoint), pair.small, **how)


def wide_layers(model: Any) -> list[CompressedWeights]:
    """Random factors for the layers of some width; the others stay dense."""
    found = []
    for name in linear_names(model):
        rows, inputs = sizes_of_layer(model.get_submodule(name))
        if min(rows, inputs) >= 32:
            low = LowRank(torch.randn(rows, 4), torch.randn(4, inputs) / inputs)
            found.append(stores(name, low, model.dtype))
    return found


def whole(model: Any, stream: FolderStream) -> list[Tensor]:
    """The output of each block."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple | list) else output).clone())

    for path in stream.layout.blocks:
        model.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    return seen


def expect_whole(pair: Pair, stream: FolderStream, dtype: str = "auto") -> None:
    """Both models' states behind every block, to the bit, one block of each in turn."""
    of_dense, of_small = (
        whole(load_model(x, dtype=dtype), stream) for x in (pair.dense, pair.small)
    )
    dense = stream.embed(TOKENS, 3)
    hidden = dense.clone()
    for block in range(len(stream.layout.blocks)):
        stream.run_block(block, dense, 3)
        with stream.loaded_compressed(block):
            stream.advance(block, hidden, 3)
        assert torch.equal(dense, of_dense[block])
        assert torch.equal(hidden, of_small[block])
    assert not torch.equal(dense, hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_models_are_the_whole_models(family: str, tmp_path: Path) -> None:
    pair = make_pair(tiny_model(family), tmp_path, layers=varied_layers)
    expect_whole(pair, open_folder(pair))


@pytest.mark.parametrize("family", [name for name in MORE if name != "mamba"])
def test_of_odd_families_too(family: str, tmp_path: Path) -> None:
    pair = make_pair(any_model(family), tmp_path, layers=wide_layers)
    expect_whole(pair, open_folder(pair))


@pytest.mark.parametrize("layers", [sparse_layers, eight_bit_layers, summed_layers])
@pytest.mark.parametrize("family", ["llama_bias", "gpt2"])
def test_of_every_kind_of_part(family: str, layers: Callable[..., Any], tmp_path: Path) -> None:
    pair = make_pair(tiny_model(family), tmp_path, layers=layers)
    expect_whole(pair, open_folder(pair))


def test_whatever_the_keys_and_dtypes_in_the_files(tmp_path: Path) -> None:
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    pair = make_pair(model, tmp_path, prefixless=True, layers=varied_layers)
    expect_whole(pair, open_folder(pair, dtype="float32"), "float32")


def test_a_folder_without_compressed_layers_is_the_dense_model(tmp_path: Path) -> None:
    pair = make_pair(tiny_model("llama"), tmp_path, layers=lambda model: [])
    stream = open_folder(pair)
    hidden = stream.embed(TOKENS, 3)
    dense = hidden.clone()
    for block in range(len(stream.layout.blocks)):
        stream.run_block(block, dense, 3)
        with stream.loaded_compressed(block):
            stream.advance(block, hidden, 3)
    assert torch.equal(hidden, dense)


def test_other_tensors_take_the_place_of_the_folders(tmp_path: Path) -> None:
    pair = make_pair(tiny_model("gpt2"), tmp_path, layers=varied_layers)
    stream = open_folder(pair)
    with stream.loaded_compressed(1) as module:
        own = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    changed = {stream.key(f"transformer.h.1.{name}"): tensor + 1 for name, tensor in own.items()}
    with stream.loaded_compressed(1, changed) as module:
        for name, tensor in module.named_parameters():
            assert torch.equal(tensor, own[name] + 1)
    assert all(tensor.is_meta for tensor in module.parameters())


def test_what_is_changed_in_place_is_read_anew_the_next_time(tmp_path: Path) -> None:
    stream = open_folder(make_pair(tiny_model("llama"), tmp_path))
    with stream.loaded_compressed(0) as module, torch.no_grad():
        before = {name: tensor.clone() for name, tensor in module.named_parameters()}
        for tensor in module.parameters():
            tensor.add_(1)
    with stream.loaded_compressed(0) as module:
        assert all(torch.equal(tensor, before[n]) for n, tensor in module.named_parameters())


def test_a_part_that_is_missing_is_named_and_the_block_is_dense_again(tmp_path: Path) -> None:
    pair = make_pair(tiny_model("llama"), tmp_path, layers=varied_layers)
    edit = Checkpoint(pair.small, compressed=True).config["quantization_config"]
    layer = "model.layers.0.mlp.up_proj"
    edit["modules"][layer] = {"rank": 2, "pivot": True}
    edit_config(pair.small, quantization_config=edit)
    stream = open_folder(pair)
    hidden = stream.embed(TOKENS, 3)
    missing = pytest.raises(ModelError, match=rf"no tensor '{layer}\.pivot_in'")
    with missing, stream.loaded_compressed(0):
        pass
    stream.run_block(0, hidden, 3)
    assert torch.equal(hidden, whole(load_model(pair.dense), stream)[0])
