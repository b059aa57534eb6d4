"""Dobi-SVD from the dense folder to one that loads, in 16 and in 8 bits."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress_core.hf  # noqa: F401  registers the format
from compress_core.errors import ConfigError
from compress_core.folder.write import count_parameters
from compress_core.forms.names import EIGHT_BITS
from compress_core.layer.stored import stored_weight
from compress_core.methods import build_method
from compress_core.types import affordable
from flows.settings.checks import check_methods
from flows.settings.config import RunConfig
from tasks.stages.arrays import Stored, get_tensor
from tests.pipeline import pico
from tests.pipeline.conftest import Run
from tests.whole import perplexity_and_kl

KEPT = 0.6
OPTIONS = "steps=4:batch=2:beta=1.0"
PLAIN, REMAP = f"dobi_svd:{OPTIONS}", f"dobi_svd:{OPTIONS}:remap=true"
BUDGET_FREE = {"tokenise", "collect", "weigh", "decompose"}

both = pytest.mark.parametrize("method", [PLAIN, REMAP], ids=["plain", "remap"])
Get = Callable[..., pico.Walk]

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def walk_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Walks with one model in one home."""
    folder = tmp_path_factory.mktemp(request.param)
    config = {"llama": pico.llama, "gpt2": pico.gpt2}[request.param]
    inputs = pico.make_inputs(folder / "inputs", config=partial(config, blocks=2))
    walks: dict[tuple[str, float], pico.Walk] = {}

    def get(method: str, kept: float = KEPT) -> pico.Walk:
        if (method, kept) not in walks:
            settings = inputs.settings(folder / "home", method=method, kept=kept)
            walks[method, kept] = pico.walk(settings)
        return walks[method, kept]

    return get


@both
def test_the_folder_is_within_the_budget_and_loads_in_both_ways(method: str, walk_of: Get) -> None:
    walk = walk_of(method)
    job = walk.pipeline.job
    attrs = walk.session.artifact(walk.pipeline.folder).attrs
    total = 0
    for layer in job.layers:
        artifact = walk.session.artifact(walk.pipeline.realised[layer.name])
        charged = replace(layer, form=EIGHT_BITS) if method == REMAP else layer
        if artifact.attrs["rank"] is not None:
            assert artifact.attrs["numbers"] == artifact.attrs["rank"] * charged.atom_cost
            weight = stored_weight(Stored(artifact))
            assert weight is not None
            assert ("bits" in artifact.attrs["entry"]) == (method == REMAP)
            assert weight.shape == (layer.out_features, layer.in_features)
        total += artifact.attrs["numbers"]
    dense = sum(layer.dense_cost for layer in job.layers)
    assert affordable(KEPT, dense) - 100 < attrs["compressible"] == total <= affordable(KEPT, dense)
    assert attrs["parameters"] == job.model.parameters - dense + total
    assert attrs["parameters"] == count_parameters(walk.folder).parameters
    unit = next(u for u in walk.session.manifests if u.name.startswith("evaluation on"))
    tokens = get_tensor(walk.session.artifact(unit), "tokens")
    for trust in (False, True):
        loaded = AutoModelForCausalLM.from_pretrained(walk.folder, trust_remote_code=trust)
        found = perplexity_and_kl(loaded.eval(), tokens, reference=None, batch_size=8)
        assert found.perplexity == pytest.approx(walk.metrics()["perplexity"], rel=1e-5)


@both
def test_what_is_stored_is_the_model_that_was_measured(method: str, walk_of: Get) -> None:
    walk = walk_of(method)
    dense: Any = AutoModelForCausalLM.from_pretrained(walk.pipeline.config.model)
    small: Any = AutoModelForCausalLM.from_pretrained(walk.folder)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        for layer in walk.pipeline.job.layers:
            artifact = walk.session.artifact(walk.pipeline.realised[layer.name])
            weight = stored_weight(Stored(artifact))
            if weight is not None:
                weight = weight.T if layer.transposed else weight
                dense.get_submodule(layer.name).weight.copy_(weight)
        assert torch.allclose(dense(tokens).logits, small(tokens).logits, atol=1e-3)


def test_8_bits_are_smaller_and_nearer_at_the_same_number_of_parameters(walk_of: Get) -> None:
    plain, remap = walk_of(PLAIN), walk_of(REMAP)
    assert remap.metrics()["kl"] < plain.metrics()["kl"]
    sizes = [walk.session.artifact(walk.pipeline.folder).attrs for walk in (plain, remap)]
    assert sizes[1]["bytes"] < sizes[0]["bytes"]  # in float32 a code takes a quarter
    assert sizes[1]["memory"]["compressed"] < sizes[0]["memory"]["compressed"]
    tensors = load_file(remap.folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.int8}
    settings = json.loads((remap.folder / "config.json").read_text())["quantization_config"]
    assert {entry["bits"] for entry in settings["modules"].values()} == {8}


def test_methods_and_budgets_share_every_decomposition(walk_of: Get) -> None:
    walk_of(PLAIN), walk_of(REMAP)
    for method in (PLAIN, REMAP):
        other = walk_of(method, 0.4)
        assert not BUDGET_FREE & other.computed.keys()
        assert other.computed["learn"] == other.names("learn")
    one, two = walk_of(PLAIN).keys, walk_of(REMAP).keys
    shared = {stage for (stage, name), key in one.items() if two.get((stage, name)) == key}
    assert shared >= BUDGET_FREE and not {"learn", "realise"} & shared


@both
def test_again_nothing_is_computed(method: str, walk_of: Get) -> None:
    walk = walk_of(method)
    assert pico.walk(walk.pipeline.config.model_dump()).computed == {}


def test_8_bits_are_said_and_not_trained_on(walk_of: Get, inputs: pico.Inputs) -> None:
    assert any("mixed quantisation" in note for note in walk_of(REMAP).problems)
    assert not any("mixed quantisation" in note for note in walk_of(PLAIN).problems)
    assert "mixed quantisation" in build_method("dobi_svd").summary
    config = RunConfig(**inputs.settings(walk_of(REMAP).pipeline.config.home, recover="factors"))
    check_methods(config, [PLAIN], [KEPT])
    with pytest.raises(ConfigError, match=r"remap=true' stores its factors in 8 bits, whose codes"):
        check_methods(config, [PLAIN, REMAP], [KEPT])


def test_a_sweep_says_it_too(run: Run, inputs: pico.Inputs, home: Path) -> None:
    results = run(inputs.settings(home, methods=[PLAIN, REMAP], kept=[KEPT]))
    assert [result["method"] for result in results] == [PLAIN, REMAP]
    assert all(any("mixed quantisation" in note for note in r["notes"]) for r in results)
    report = next((home / "reports").rglob("table.md")).read_text(encoding="utf-8")
    assert "numbers of 8 bits (mixed quantisation) as half a parameter" in report
