"""Every method from the dense folder to a compressed one that loads: budget, files, what is shared.

One home per model, so that methods find one another's statistics there.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress_core.hf  # noqa: F401  registers the format
from compress_core.forms.kinds import SLOTS
from compress_core.forms.room import counted
from compress_core.methods import METHODS, build_method
from tasks.stages.arrays import get_tensor
from tests.learning import few_turns
from tests.pipeline import pico
from tests.pipeline.folders import entries_of, expect_shared, shared_of
from tests.whole import perplexity_and_kl

KEPT = 0.5
MODELS = {  # and how many blocks; the deep ones for what reaches over several
    "llama": (pico.llama, 2),
    "deep": (pico.llama, 4),
    "gpt2": (pico.gpt2, 2),
    "deep_gpt2": (pico.gpt2, 4),
}
FACTORS = [  # methods that prune and those that learn have tests of their own
    few_turns(name)
    for name in METHODS
    if not build_method(name).prunes and build_method(name).learn is None
]
METHODS_OF = {
    "llama": [
        *FACTORS,
        "svd_llm:update=u",
        "ada_svd:calibration=streaming:prefix=block",
        "saes_svd:prefix=block",
        "duo_svd:refit_columns=true:search=grid:probe_windows=2",
        "svd_llm:factors=pivot",
        "ada_svd:factors=plain",
        "svd:factors=plain",
        "oats:factors=plain",
        "duo_svd:probe_windows=2:factors=pivot",
        "svd_llm@fisher:metric=two_sided:factors=pivot",
        "ada_svd:metric=two_sided",
        "saes_svd@hull:metric=two_sided",
        "duo_svd@uniform:metric=two_sided",
        "fwsvd:metric=two_sided",
    ],
    "deep": ["basis_sharing:group=4:update=u", "saes_svd"],
    "gpt2": [
        *FACTORS,
        "svd_llm:update=u",
        "svd_llm:factors=pivot",
        "svd_llm_v2:metric=two_sided:factors=plain",
    ],
}
CASES = [(model, method) for model, methods in METHODS_OF.items() for method in methods]
every_case = pytest.mark.parametrize(("model", "method"), CASES)

Get = Callable[..., pico.Walk]

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pico.Inputs]:
    root = tmp_path_factory.mktemp("models")

    return {
        name: pico.make_inputs(root / name, config=partial(config, blocks=blocks))
        for name, (config, blocks) in MODELS.items()
    }


@pytest.fixture(scope="module")
def done(models: dict[str, pico.Inputs], tmp_path_factory: pytest.TempPathFactory) -> Get:
    """The walk of a model and a method, made once."""
    root = tmp_path_factory.mktemp("homes")
    walks: dict[tuple[str, str, float], pico.Walk] = {}

    def get(model: str, method: str, kept: float = KEPT) -> pico.Walk:
        if (model, method, kept) not in walks:
            settings = models[model].settings(root / model, method=method, kept=kept)
            walks[model, method, kept] = pico.walk(settings)
        return walks[model, method, kept]

    return get


def tensors_of(walk: pico.Walk) -> dict[str, Tensor]:
    return load_file(walk.folder / "model.safetensors")


def stored(walk: pico.Walk) -> dict[str, int]:
    """Layer to the numbers that the files hold for it."""
    tensors = tensors_of(walk)
    prefix = walk.pipeline.job.model.layout.base_prefix
    found = {}
    for layer in walk.pipeline.job.model.layout.layers:
        names = [f"{layer.name}.{part}" for part in SLOTS]
        names += [name.removeprefix(f"{prefix}.") for name in names if name not in tensors]
        found[layer.name] = count({name: tensors[name] for name in names if name in tensors})
    return found


def count(tensors: dict[str, Tensor]) -> int:
    """Numbers that tensors of these folders count as."""
    return counted((key, t.numel(), t.dtype is torch.int32) for key, t in tensors.items())


@every_case
def test_what_is_stored_is_what_was_allowed(model: str, method: str, done: Get) -> None:
    walk = done(model, method)
    attrs = walk.session.artifact(walk.pipeline.folder).attrs
    layers = walk.pipeline.job.model.layout.layers
    dense = sum(layer.dense_cost for layer in layers)
    numbers = stored(walk)
    assert sum(numbers.values()) == attrs["compressible"] <= KEPT * dense
    least = 0.85 * KEPT if not walk.pipeline.job.method.rounds else 6 / 16  # widths go by steps
    assert attrs["compressible"] > least * dense
    tensors = tensors_of(walk)
    assert attrs["parameters"] == count(tensors)
    assert attrs["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    removed = walk.pipeline.job.model.parameters - attrs["parameters"]
    assert removed == dense - attrs["compressible"]
    for name, unit in walk.pipeline.realised.items():
        assert walk.session.artifact(unit).attrs["numbers"] == numbers[name]
    entries = entries_of(walk.folder).values()
    assert all(entry["rank"] >= 1 or "base" in entry for entry in entries)
    assert pico.scratch_left(walk.session.store.root) == []


@every_case
def test_the_folder_loads_in_both_ways(model: str, method: str, done: Get) -> None:
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
        head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        assert head.weight is embedding.weight  # tied, as in the dense model
        found.append(perplexity_and_kl(loaded.eval(), tokens, reference=None, batch_size=8))
    assert found[0].perplexity == found[1].perplexity
    metrics = walk.metrics()
    assert found[0].perplexity == pytest.approx(metrics["perplexity"], rel=1e-6)
    assert 1 < metrics["perplexity"] < 1e4 and 0 < metrics["kl"] < 10


@pytest.mark.parametrize(
    ("model", "method", "group", "shared"),
    [
        (
            "llama",
            "basis_sharing:factors=plain",
            2,
            {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
        ),
        (
            "deep",
            "basis_sharing:group=4:update=u:factors=plain",
            4,
            {"q_proj", "k_proj", "v_proj", "up_proj"},
        ),
        ("deep_gpt2", "basis_sharing:factors=plain", 2, {"c_attn", "c_fc"}),
    ],
)
def test_a_shared_basis_is_stored_once_and_is_one_parameter(
    model: str, method: str, group: int, shared: set[str], done: Get
) -> None:
    walk = done(model, method)
    owners = shared_of(walk.folder)
    layers = {layer.name: layer for layer in walk.pipeline.job.model.layout.layers}
    for name, owner in owners.items():
        first = layers[name].block // group * group
        assert owner == name.replace(f".{layers[name].block}.", f".{first}.") != name
    kinds = {name.rpartition(".")[2] for name in owners}
    assert shared <= kinds and not kinds & {"o_proj", "down_proj", "c_proj"}
    entries = entries_of(walk.folder)
    factors = [key for key in tensors_of(walk) if key.endswith(".factor_in")]
    assert len(factors) == len(entries) - len(owners)
    for name, unit in walk.pipeline.realised.items():  # in the store, too
        key = walk.session.manifests[unit].key
        arrays = walk.session.store.root / "realise" / key[:2] / key / "arrays"
        assert (arrays / "weight").exists() and (arrays / "factor_in").exists() == (
            name not in owners
        )
    for trust in (False, True):
        loaded = AutoModelForCausalLM.from_pretrained(walk.folder, trust_remote_code=trust)
        expect_shared(loaded, walk.folder)
        attrs = walk.session.artifact(walk.pipeline.folder).attrs
        assert sum(parameter.numel() for parameter in loaded.parameters()) == attrs["parameters"]


@pytest.mark.parametrize(
    ("model", "method", "kept"),
    [
        ("llama", "duo_svd", KEPT),
        ("llama", "duo_svd@uniform:factors=plain", KEPT),
        ("llama", "duo_svd@uniform:metric=two_sided:factors=plain", KEPT),
        ("llama", "duo_svd:refit_columns=true:search=grid:probe_windows=2", KEPT),
        ("gpt2", "duo_svd@uniform", 0.9),
    ],
)
def test_kept_columns_are_the_dense_ones_unless_fitted_again(
    model: str, method: str, kept: float, done: Get, models: dict[str, pico.Inputs]
) -> None:
    walk = done(model, method, kept)
    tensors, dense = tensors_of(walk), load_file(models[model].model / "model.safetensors")
    entries = entries_of(walk.folder)
    columns = {name: entry["columns"] for name, entry in entries.items() if "columns" in entry}
    assert columns
    prefix = f"{walk.pipeline.job.model.layout.base_prefix}."
    for name, count in columns.items():
        key = name if f"{name}.columns" in tensors else name.removeprefix(prefix)
        index = tensors[f"{key}.column_index"]
        assert (len(index), index.dtype) == (count, torch.int16)
        weight = dense[f"{name}.weight" if f"{name}.weight" in dense else f"{key}.weight"]
        weight = weight.T if model == "gpt2" else weight
        same = torch.equal(tensors[f"{key}.columns"], weight[:, index.long()])
        assert same == ("refit" not in method)
        assert walk.session.artifact(walk.pipeline.realised[name]).attrs["columns"] == count


def test_methods_share_what_they_measure_on_the_dense_model(done: Get) -> None:
    """All that read the Gram make one set of statistics and, layer by layer, one decomposition."""
    first = done("llama", "svd_llm")
    for method in ("ada_svd", "saes_svd", "duo_svd", "svd_llm_v2", "svd_llm:update=u"):
        keys = done("llama", method).keys
        for name, key in first.keys.items():
            assert name[0] not in ("tokenise", "collect", "weigh", "decompose") or keys[name] == key


@pytest.mark.parametrize(
    "allocator", ["uniform", "by_type", "importance", "hull", "fisher", "knapsack"]
)
def test_any_allocator_divides_the_budget_of_any_method(
    allocator: str, done: Get, models: dict[str, pico.Inputs]
) -> None:
    plain, walk = done("llama", "svd_llm"), done("llama", f"svd_llm@{allocator}")
    by_flag = pico.walk(
        models["llama"].settings(
            Path(walk.pipeline.config.home), method="svd_llm", kept=KEPT, allocate=allocator
        )
    )
    assert by_flag.computed == {} and by_flag.keys == walk.keys
    assert not {"tokenise", "weigh", "decompose"} & set(walk.computed)
    assert ("predict" in walk.computed) == (allocator in ("fisher", "prices"))
    assert "collect" not in walk.computed or allocator in ("fisher", "prices")  # who is first
    layers = walk.pipeline.job.layers
    budget = KEPT * sum(layer.dense_cost for layer in layers)
    spent = walk.session.artifact(walk.pipeline.folder).attrs["compressible"]
    slack = sum(x.atom_cost for x in layers) if allocator == "uniform" else 2 * 88
    assert budget - slack < spent <= budget
    ranks = [
        w.session.artifact(pico.allocation_of(w.pipeline)).attrs["ranks"] for w in (plain, walk)
    ]
    assert (ranks[0] == ranks[1]) == (allocator == "uniform")
    assert ("probe" in {outcome.stage for outcome in walk.outcomes}) == (
        allocator in ("hull", "knapsack")
    )


@pytest.mark.parametrize(
    "method",
    ["basis_sharing@hull", "basis_sharing@fisher", "basis_sharing@knapsack", "asvd@by_type"],
)
def test_an_allocator_divides_among_stacks_too(method: str, done: Get) -> None:
    walk = done("llama", method)
    dense = sum(layer.dense_cost for layer in walk.pipeline.job.model.layout.layers)
    spent = walk.session.artifact(walk.pipeline.folder).attrs["compressible"]
    assert 0.9 * KEPT * dense < spent == sum(stored(walk).values()) <= KEPT * dense


def test_a_share_of_the_whole_model(models: dict[str, pico.Inputs], done: Get) -> None:
    home = Path(done("llama", "svd_llm").pipeline.config.home)
    for method in ("svd_llm@importance", "basis_sharing", "duo_svd@uniform"):
        walk = pico.walk(models["llama"].settings(home, method=method, kept=0.6, of="model"))
        attrs = walk.session.artifact(walk.pipeline.folder).attrs
        dense = walk.pipeline.job.model.parameters
        assert 0.5 * dense < attrs["parameters"] <= 0.6 * dense
        assert json.loads((walk.folder / "config.json").read_text())["tie_word_embeddings"]
