"""A model in bfloat16 that runs in another dtype: keys, what is stored, what the result says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_core import compute
from compress_core.hf.loading import load_model
from tasks.stages.materialise import FOLDER
from tests.pipeline import pico

RUNS_MODEL = {"collect", "evaluate"}
EIGHT_BITS = "dobi_svd:steps=4:batch=2:beta=1.0:remap=true"


@pytest.fixture(scope="module")
def half(inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "model"
    shutil.copytree(inputs.model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    weights = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def walked(inputs: pico.Inputs, home: Path, **changes: Any) -> pico.Walk:
    return pico.walk(inputs.settings(home, **changes))


def written(walk: pico.Walk) -> Path:
    return walk.session.artifact(walk.pipeline.folder).file(FOLDER)


def test_another_compute_measures_again_and_stores_in_the_models_dtype(
    inputs: pico.Inputs, half: Path, tmp_path: Path
) -> None:
    first = walked(inputs, tmp_path, model=str(half), compute="float32")
    again = walked(inputs, tmp_path, model=str(half), compute="float32")
    other = walked(inputs, tmp_path, model=str(half), compute="model")
    assert not again.computed
    assert set(other.computed) >= RUNS_MODEL
    assert "tokenise" in first.computed and "tokenise" not in other.computed
    for walk in (first, other):
        tensors = load_file(written(walk) / "model.safetensors").values()
        numbers = [tensor for tensor in tensors if tensor.is_floating_point()]  # not marks of rows
        assert {tensor.dtype for tensor in numbers} == {torch.bfloat16}


def test_auto_has_the_keys_of_the_dtype_it_comes_to(
    inputs: pico.Inputs, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, same in ((frozenset(), "float32"), (frozenset({"avx512_bf16"}), "bfloat16")):
        monkeypatch.setattr(compute, "cpu_flags", lambda flags=flags: flags)
        walked(inputs, tmp_path / same, model=str(half), compute=same)
        assert not walked(inputs, tmp_path / same, model=str(half), compute="auto").computed


def test_a_float32_model_has_the_same_keys_under_auto_model_and_float32(
    inputs: pico.Inputs, tmp_path: Path
) -> None:
    assert walked(inputs, tmp_path, compute="auto").computed
    assert not walked(inputs, tmp_path, compute="model").computed
    assert not walked(inputs, tmp_path, compute="float32").computed


@pytest.mark.parametrize("method", ["svd_llm", "basis_sharing:group=3", "sparsegpt", EIGHT_BITS])
def test_every_stored_form_loads_into_another_dtype_than_it_is_stored_in(
    inputs: pico.Inputs, half: Path, tmp_path: Path, method: str
) -> None:
    walk = walked(inputs, tmp_path, model=str(half), compute="float32", method=method)
    folder = written(walk)
    tokens = torch.arange(40).view(2, 20)
    wide = load_model(folder, dtype="float32")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    exact = load_model(folder, dtype="float64")
    with torch.no_grad():
        want = exact(tokens).logits.log_softmax(-1)
        assert torch.allclose(wide(tokens).logits.log_softmax(-1).double(), want, atol=1e-3)
        narrow = load_model(folder)
        assert narrow.dtype is torch.bfloat16
        assert torch.allclose(narrow(tokens).logits.log_softmax(-1).double(), want, atol=0.5)
