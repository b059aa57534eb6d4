"""The bytes that a compressed model holds are known before it is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress_core.hf  # noqa: F401  registers the format
from compress_core.folder.memory import bytes_in_memory, expected_bytes
from compress_core.forms.linear import CompressedLinear, is_compressed
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.loading import load_model
from tests.families import tiny_model, token_batch
from tests.pipeline import pico
from tests.pipeline.contents import sparse_layers, varied_layers
from tests.pipeline.folders import make_pair

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gpt_neox", "opt", "phi3"])
@pytest.mark.parametrize("layers", [None, varied_layers, sparse_layers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_in_memory_are_expected(
    family: str, layers: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    pair = make_pair(tiny_model(family, dtype=dtype), tmp_path, layers=layers)
    found = {}
    for folder in (pair.dense, pair.small):
        model = load_model(folder)
        before = bytes_in_memory(model)
        for rows in (2, 1):  # what is kept does not depend on the tokens
            with torch.inference_mode():
                model(token_batch()[:rows])
        found[folder] = bytes_in_memory(model)
        assert expected_bytes(Checkpoint(folder, compressed=folder == pair.small)) == found[folder]
        assert (found[folder] > before) == (folder == pair.small and layers is not None)
    if layers is None:
        assert found[pair.small] < found[pair.dense]


@pytest.mark.parametrize("trust", [False, True], ids=["stock", "remote"])
def test_it_is_the_same_for_the_code_in_the_folder(trust: bool, tmp_path: Path) -> None:
    pair = make_pair(tiny_model("llama"), tmp_path, layers=sparse_layers)
    model: Any = AutoModelForCausalLM.from_pretrained(pair.small, trust_remote_code=trust)
    with torch.no_grad():
        model(token_batch())
    assert bytes_in_memory(model) == expected_bytes(Checkpoint(pair.small, compressed=True))
    model.train()
    model(token_batch()).logits.sum().backward()  # a dense weight goes when training begins
    layers = [module for module in model.modules() if is_compressed(module)]
    kept = [list(layer.kept_tensors()) for layer in layers if "nonzeros" in layer.entry]
    assert kept and all(places.dtype is torch.int64 for (places,) in kept)


@pytest.mark.parametrize(
    ("rank", "count", "dtype", "sparse"),
    [
        (0, 682, torch.float32, True),  # 6 * 682 < 64 * 64
        (0, 683, torch.float32, False),
        (8, 512, torch.float64, True),  # 8 * 128 + 6 * 512 = 64 * 64
        (8, 513, torch.float64, False),
        (0, 100, torch.bfloat16, False),
    ],
)
def test_which_way_is_taken_follows_from_sizes_alone(
    rank: int, count: int, dtype: torch.dtype, sparse: bool
) -> None:
    layer = CompressedLinear(64, 64, {"rank": rank, "nonzeros": count}, dtype=dtype)
    has_mkl = torch.backends.mkl.is_available()
    assert layer.runs_whole(torch.device("cpu")) != (sparse and has_mkl)
    assert layer.runs_whole(torch.device("cuda"))


@pytest.mark.parametrize("method", ["svd_llm", "duo_svd", "wanda", "oats"])
def test_a_run_says_what_its_model_holds(method: str, inputs: pico.Inputs, warm_home: Path) -> None:
    walk = pico.walk(inputs.settings(warm_home, method=method, kept=0.4))
    said = walk.session.artifact(walk.pipeline.folder).attrs["memory"]
    for which, folder in (("dense", inputs.model), ("compressed", walk.folder)):
        model = load_model(folder)
        with torch.inference_mode():
            model(torch.arange(8)[None])
        assert said[which] == bytes_in_memory(model)
