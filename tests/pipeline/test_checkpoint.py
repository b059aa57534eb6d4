"""Reading a model folder by name, and one clear line for every folder that is not one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_core.errors import ModelError
from compress_core.hf.checkpoint import Checkpoint, resolve_model
from tests.families import tiny_model
from tests.pipeline.folders import edit_config, make_pair


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The dense folder of a tiny Llama."""
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_tensors_are_those_of_the_file(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    tensors = load_file(llama / "model.safetensors")
    assert checkpoint.names == sorted(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(checkpoint.read(key), tensor)
        assert checkpoint.shape(key) == tuple(tensor.shape)
        assert checkpoint.dtype(key) == "BF16" and checkpoint.torch_dtype(key) == tensor.dtype
    assert checkpoint.config["model_type"] == "llama"


def test_shards_read_as_one(llama: Path, tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "shards", max_shard_size="10KB"
    )
    whole, shards = Checkpoint(llama), Checkpoint(tmp_path / "shards")
    assert len(shards.files) > 2 and shards.names == whole.names
    assert all(torch.equal(shards.read(key), whole.read(key)) for key in whole.names)


def test_unknown_key_names_the_nearest(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"no tensor .*nearest: .*layers\.0\.mlp\.up_proj\.weight"):
        Checkpoint(llama).read("model.layers.0.mlp.up.weight")


def test_folders_that_are_no_model(llama: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "a folder that is no model" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "neither model.safetensors nor" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    assert "only .bin weights" in refusal(tmp_path / "empty")
    (llama / "config.json").write_text("{ not json")
    assert "not readable JSON" in refusal(llama)


def test_incomplete_and_damaged_weights(llama: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path / "shards")
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read" in refusal(llama)


def test_only_dense_models_are_taken(llama: Path, tmp_path: Path) -> None:
    small = make_pair(tiny_model("llama"), tmp_path / "pair").small
    assert "already compressed" in refusal(small)
    assert Checkpoint(small, compressed=True).config["quantization_config"]["modules"]
    edit_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised with gptq; start" in refusal(llama).replace(":", ";")
    with pytest.raises(ModelError, match="not a model that eigenpress compressed"):
        Checkpoint(llama, compressed=True)


def test_a_tensor_stored_as_something_odd_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a.weight": torch.zeros(4, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"a\.weight is stored as C64"):
        Checkpoint(tmp_path).torch_dtype("a.weight")


def test_sources_of_models(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(llama)) == llama.resolve()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("llama") == llama.resolve()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, message in [
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("someone/some-model", "the hub could not provide it"),
        ("bad name", "the hub could not provide it"),
        ("llama/config.json", "is a file"),
    ]:
        with pytest.raises(ModelError, match=message) as caught:
            resolve_model(source, cache_dir=tmp_path / "hub")
        assert "\n" not in str(caught.value)
