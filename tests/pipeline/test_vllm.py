"""A folder written for vLLM holds under the rules by which its Transformers backend loads models.

vLLM itself is not run here: its rules are applied to the folder, as they stand in its source.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from compress_core.decompose import LowRank
from compress_core.errors import ModelError
from compress_core.folder.for_vllm import to_vllm
from tests.families import tiny_model
from tests.pipeline.contents import (
    coded_layers,
    eight_bit_layers,
    sparse_layers,
    stores,
    summed_layers,
    varied_layers,
)
from tests.pipeline.folders import BATCH, Pair, load, logits_of, make_pair

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module", params=["llama", "llama_varied", "qwen2", "gpt_neox"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Plain factors; shared ones and kept columns; biases; another base model's names."""
    family = request.param.removesuffix("_varied")
    layers = varied_layers if request.param != family else None
    return make_pair(tiny_model(family), tmp_path_factory.mktemp("vllm"), layers=layers)


def _as_vllm_does(folder: Path) -> Any:
    """The base model, every `nn.Linear` child a fresh one of its sizes, loaded by name."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert getattr(config, "quantization_config", None) is None
    model = AutoModel.from_config(config, trust_remote_code=True)
    assert type(model)._supports_attention_backend

    def replace(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                sizes = child.in_features, child.out_features
                setattr(module, name, nn.Linear(*sizes, bias=child.bias is not None))
            else:
                replace(child)

    replace(model)
    stored = load_file(folder / "model.safetensors")
    whole = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    prefix = f"{whole.base_model_prefix}."
    base = {key.removeprefix(prefix): v for key, v in stored.items() if key.startswith(prefix)}
    model.load_state_dict(base, strict=True)
    return model.eval()


def test_it_loads_by_the_rules_of_vllm(pair: Pair, tmp_path: Path) -> None:
    to_vllm(pair.small, tmp_path / "out")
    model = _as_vllm_does(tmp_path / "out")
    with torch.no_grad():
        want = pair.reference.base_model(BATCH).last_hidden_state
        found = model(BATCH).last_hidden_state
        logits = pair.reference.get_output_embeddings()(found)
    assert torch.allclose(found, want, atol=1e-5, rtol=0)
    assert torch.allclose(logits, logits_of(pair.reference), atol=1e-5, rtol=0)
    written = load(tmp_path / "out", trust=True)
    assert torch.allclose(logits_of(written), logits_of(pair.reference), atol=1e-5, rtol=0)


def test_the_plan_divides_a_pair_as_it_divided_the_layer(tmp_path: Path) -> None:
    def some(model: Any) -> Any:
        return [layer for layer in varied_layers(model) if layer.name != DENSE]

    pair = make_pair(tiny_model("llama"), tmp_path, layers=some)
    to_vllm(pair.small, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True)
    plan = model.tp_plan

    def style(name: str) -> str | None:  # the first pattern that a name begins with, as vLLM has it
        return next((plan[pattern] for pattern in plan if re.match(pattern, name)), None)

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {name: style(name) for name in linears}
    for name, divided in found.items():
        layer, _, part = name.rpartition(".")
        if part in ("in_factor", "out_factor"):
            rows = layer.endswith(("o_proj", "down_proj"))
            want = ("rowwise" if rows else None) if part == "in_factor" else None
            want = "colwise" if part == "out_factor" and not rows else want
            assert divided == want, name
    assert found[DENSE.removeprefix("model.")] == "colwise"


DENSE = "model.layers.1.self_attn.q_proj"


def test_modules_of_one_class_have_pairs_in_the_same_places(tmp_path: Path) -> None:
    def in_one_block(model: Any) -> Any:
        return [layer for layer in varied_layers(model) if ".layers.1." not in layer.name]

    pair = make_pair(tiny_model("llama"), tmp_path, layers=in_one_block)
    to_vllm(pair.small, tmp_path / "out")
    model = load(tmp_path / "out", trust=True)
    assert torch.allclose(logits_of(model), logits_of(pair.reference), atol=1e-5, rtol=0)
    stock = type(tiny_model("llama").model.layers[0].mlp)
    kinds: dict[type, set[Any]] = {}
    for module in model.modules():
        kinds.setdefault(type(module), set()).add(_pairs_in(module))
    # vLLM decides for a class by one of its modules whether to fuse the linear layers in it
    assert {len(places) for kind, places in kinds.items() if kind.__name__ != "ModuleList"} == {1}
    assert kinds[stock] == {frozenset()} and isinstance(model.model.layers[0].mlp, stock)


def _pairs_in(module: nn.Module) -> frozenset[str]:
    children = module.named_children()
    return frozenset(name for name, child in children if type(child).__name__ == "LinearPair")


def test_a_layer_of_rank_0_is_its_bias(tmp_path: Path) -> None:
    def nothing(model: Any) -> Any:
        layer = varied_layers(model)[0]
        rows, inputs = model.get_submodule(layer.name).weight.shape
        zeros = torch.zeros(rows, 0), torch.zeros(0, inputs)
        return [stores(layer.name, LowRank(*zeros, bias=torch.arange(rows) / rows))]

    pair = make_pair(tiny_model("llama"), tmp_path, layers=nothing)
    to_vllm(pair.small, tmp_path / "out")
    model = _as_vllm_does(tmp_path / "out")
    with torch.no_grad():
        want = pair.reference.base_model(BATCH).last_hidden_state
        assert torch.allclose(model(BATCH).last_hidden_state, want, atol=1e-5, rtol=0)


def test_a_missing_factor_never_becomes_a_random_one(tmp_path: Path) -> None:
    to_vllm(make_pair(tiny_model("llama"), tmp_path).small, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    lost = "model.layers.0.mlp.up_proj.in_factor.weight"
    save_file({k: v for k, v in load_file(file).items() if k != lost}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"no {re.escape(lost)}"):
        load(tmp_path / "out", trust=True)


def test_it_needs_nothing_of_ours_and_its_code(tmp_path: Path) -> None:
    pair = make_pair(tiny_model("llama"), tmp_path)
    to_vllm(pair.small, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["TransformersForCausalLM"]
    # a stock class would load random numbers with a warning
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert "compress_core" not in (tmp_path / "out" / "modeling_eigenpress_vllm.py").read_text()


@pytest.mark.parametrize(
    ("layers", "what"),
    [
        (sparse_layers, "sparse entries"),
        (eight_bit_layers, "factors in 8 bits"),
        (summed_layers, "has sparse entries"),
        (coded_layers, "has a base and numbers in codes"),
    ],
)
def test_what_linear_layers_cannot_hold_is_refused(layers: Any, what: str, tmp_path: Path) -> None:
    pair = make_pair(tiny_model("llama"), tmp_path, layers=layers)
    with pytest.raises(ModelError, match=f"{what}.*--to dense"):
        to_vllm(pair.small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
