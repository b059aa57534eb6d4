"""Methods that prune, from the dense folder to one that loads: entries, order, resuming, reuse."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress_core.hf  # noqa: F401  registers the format
from compress_core.layer.stored import stored_weight, tensors_of
from compress_core.sparse import unpack
from compress_core.types import affordable
from tasks.stages.allocate import read_shares
from tasks.stages.arrays import Stored, get_tensor
from tests.pipeline import pico
from tests.pipeline.conftest import Run
from tests.pipeline.halting import halt
from tests.pipeline.test_sequential_resume import check_resumed, done_in
from tests.whole import perplexity_and_kl

KEPT = 0.5
BUDGETS = {
    "wanda": KEPT,
    "sparsegpt": KEPT,
    "oats:iterations=4": KEPT,
    "slim": KEPT,
    "hassle_free:iterations=3": KEPT,
    "wanda:pattern=2:4": KEPT,
    "sparsegpt:pattern=4:8": KEPT,
    "oats:iterations=4:low_rank=0.3:pattern=2:4:factors=plain": 0.695,  # 0.6932 fits
}
MODELS = {"llama": partial(pico.llama, blocks=2), "gpt2": partial(pico.gpt2, blocks=2)}
CASES = [("llama", method) for method in BUDGETS]
CASES += [("gpt2", method) for method in ("sparsegpt", "oats:iterations=4")]
every_case = pytest.mark.parametrize(("model", "method"), CASES)

Get = Callable[..., pico.Walk]

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """The walk of a model and a method, made once."""
    root = tmp_path_factory.mktemp("pruned")
    inputs = {name: pico.make_inputs(root / name, config=MODELS[name]) for name in MODELS}
    walks: dict[tuple[str, str], pico.Walk] = {}

    def get(model: str, method: str) -> pico.Walk:
        if (model, method) not in walks:
            home = root / "homes" / model
            settings = inputs[model].settings(home, method=method, kept=BUDGETS[method])
            walks[model, method] = pico.walk(settings)
        return walks[model, method]

    return get


def weight_of(walk: pico.Walk, name: str) -> torch.Tensor:
    """What a layer's parts stand for."""
    weight = stored_weight(Stored(walk.session.artifact(walk.pipeline.realised[name])))
    assert weight is not None
    return weight


def mask_of(walk: pico.Walk, name: str) -> torch.Tensor:
    """Where its entries are."""
    record = Stored(walk.session.artifact(walk.pipeline.realised[name]))
    out_features, in_features = record.attrs["sizes"]
    return unpack(tensors_of(record), out_features, in_features)


@every_case
def test_every_layer_stores_the_numbers_of_its_share(model: str, method: str, done: Get) -> None:
    walk = done(model, method)
    job = walk.pipeline.job
    shares = read_shares(walk.session.artifact(pico.allocation_of(walk.pipeline)))
    total = 0
    for layer in job.layers:
        artifact = walk.session.artifact(walk.pipeline.realised[layer.name])
        share, attrs = shares[layer.name], artifact.attrs
        assert share.nonzeros > 0
        assert (attrs["rank"], attrs["nonzeros"]) == (share.rank, share.nonzeros)
        assert len(tensors_of(Stored(artifact))["sparse_values"]) == share.nonzeros
        assert artifact.attrs["numbers"] == share.cost(layer)
        if ":pattern=" not in method:
            assert share.cost(layer) == affordable(KEPT, layer.dense_cost)
        total += share.cost(layer)
        assert weight_of(walk, layer.name).shape == (layer.out_features, layer.in_features)
    attrs = walk.session.artifact(walk.pipeline.folder).attrs
    assert attrs["compressible"] == total <= BUDGETS[method] * sum(x.dense_cost for x in job.layers)
    assert not {"collect", "weigh", "decompose"} & {outcome.stage for outcome in walk.outcomes}
    assert pico.scratch_left(walk.session.store.root) == []


@every_case
def test_the_folder_loads_in_both_ways_and_is_what_was_realised(
    model: str, method: str, done: Get
) -> None:
    walk = done(model, method)
    unit = next(u for u in walk.session.manifests if u.name.startswith("evaluation on"))
    tokens = get_tensor(walk.session.artifact(unit), "tokens")
    found = []
    for trust in (False, True):
        pair: Any = AutoModelForCausalLM.from_pretrained(
            walk.folder, trust_remote_code=trust, output_loading_info=True
        )
        loaded, told = pair
        assert not told["missing_keys"] and not told["unexpected_keys"]
        found.append(perplexity_and_kl(loaded.eval(), tokens, reference=None, batch_size=8))
    assert found[0].perplexity == found[1].perplexity
    metrics = walk.metrics()
    assert found[0].perplexity == pytest.approx(metrics["perplexity"], rel=1e-6)
    assert 1 < metrics["perplexity"] < 1e4 and 0 < metrics["kl"] < 10
    dense: Any = AutoModelForCausalLM.from_pretrained(walk.pipeline.config.model)
    with torch.no_grad():
        for layer in walk.pipeline.job.layers:
            found_weight = weight_of(walk, layer.name)
            weight = found_weight.T if layer.transposed else found_weight
            dense.get_submodule(layer.name).weight.copy_(weight)
    by_hand = perplexity_and_kl(dense.eval(), tokens, reference=None, batch_size=8)
    assert by_hand.perplexity == pytest.approx(metrics["perplexity"], rel=1e-4)


def test_masks_of_a_pattern_keep_two_of_every_four(done: Get) -> None:
    for method in ("wanda:pattern=2:4", "oats:iterations=4:low_rank=0.3:pattern=2:4:factors=plain"):
        walk = done("llama", method)
        for name in walk.pipeline.realised:
            mask = mask_of(walk, name)
            groups = mask.view(mask.shape[0], -1, 4)
            assert bool((groups.sum(dim=2) == 2).all())


def test_wanda_leaves_what_it_keeps_as_it_was(done: Get) -> None:
    walk = done("llama", "wanda")
    dense = load_file(Path(walk.pipeline.config.model) / "model.safetensors")
    for name in walk.pipeline.realised:
        assert torch.equal(weight_of(walk, name), dense[f"{name}.weight"] * mask_of(walk, name))


def test_pruners_share_what_is_measured_before_anything_is_compressed(done: Get) -> None:
    first, other = done("llama", "wanda"), done("llama", "sparsegpt")
    shared = {name for name, key in first.keys.items() if other.keys.get(name) == key}
    assert {stage for stage, _ in shared} == {"tokenise", "allocate", "measure", "evaluate"}
    assert {unit.split(".")[2] for stage, unit in shared if stage == "measure"} == {"0"}


def test_sparse_files_are_smaller_than_dense_ones_by_what_was_removed(done: Get) -> None:
    walk = done("llama", "wanda")
    attrs = walk.session.artifact(walk.pipeline.folder).attrs
    dense = sum(layer.dense_cost for layer in walk.pipeline.job.layers)
    removed = walk.pipeline.job.model.parameters - attrs["parameters"]
    assert removed == dense - attrs["compressible"]
    size = sum(file.stat().st_size for file in walk.folder.glob("*.safetensors"))
    whole = Path(walk.pipeline.config.model) / "model.safetensors"
    places = dense / 8  # a bit each, or less
    assert size < whole.stat().st_size - 4 * removed + places + 20_000
    assert json.loads((walk.folder / "config.json").read_text())["tie_word_embeddings"]


METHOD = "oats:iterations=4"
INSIDE = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def whole(inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> pico.Walk:
    """A walk that nobody killed, behind one that left tokens only."""
    return pico.walk(inputs.settings(tmp_path_factory.mktemp("whole") / "home", method=METHOD))


def test_killed_within_a_block_the_same_command_goes_on_to_the_same_bytes(
    whole: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    """At the other moments too: test_sequential_resume, whose mechanism it is."""
    settings = inputs.settings(home, method=METHOD)
    halt(settings, "realise", INSIDE, "after")
    done_before = done_in(home / "store")
    assert done_before
    check_resumed(pico.walk(settings), whole, done_before)


def test_again_and_at_another_budget(whole: pico.Walk, inputs: pico.Inputs, home: Path) -> None:
    shutil.copytree(whole.session.store.root, home / "store")
    settings = inputs.settings(home, method=METHOD)
    assert pico.walk(settings).computed == {}
    other = pico.walk({**settings, "kept": 0.4})
    assert "tokenise" not in other.computed
    fresh = {name for name in other.names("measure") if not name.startswith("model.layers.0.")}
    assert other.computed["measure"] == fresh  # before the first compressed block all is as it was
    assert other.computed["realise"] == other.names("realise")


def test_a_sweep_prunes_and_counts(run: Run, inputs: pico.Inputs, home: Path) -> None:
    settings = inputs.settings(home, methods=["wanda", "slim:rank_share=0.05"], kept=[KEPT])
    results = run(settings)
    assert [result["method"] for result in results] == settings["methods"]
    for result in results:
        parameters = result["parameters"]
        share = parameters["compressible_compressed"] / parameters["compressible_dense"]
        assert 0.49 < share <= KEPT
