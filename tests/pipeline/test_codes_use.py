"""Codes and the methods of codes, from the dense folder to one that loads: room, reuse, keys."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress_core.hf  # noqa: F401  registers the format
from compress_core.forms.kinds import numbers_of, sizes_of
from compress_core.forms.room import bits_of
from compress_core.sparse import index_bytes
from compress_core.types import LayerRef
from flows.runs.results import kinds_of
from tasks.engine.units import Unit
from tasks.stages.allocate import read_shares
from tests.pipeline import codes, pico
from tests.pipeline.folders import entries_of, logits_of

METHODS = {
    "svd_llm:bits=4": 0.2,
    "svd_llm:bits=4:factors=plain": 0.2,
    "svd_llm@fisher:bits=4": 0.2,
    "svd_llm:bits=4:factors=pivot": 0.2,
    "saes_svd:bits=4": 0.2,
    "saes_svd:bits=3:rounding=nearest:prefix=block": 0.15,
    "rtn": 0.3,
    "gptq": 0.3,
    "gptq:mixed=true": 0.3,
    "caldera:turns=2": 0.25,
    "caldera:factor_bits=16:turns=1:factors=pivot": 0.4,
    "press": 0.25,
    "press:bits=16": 0.6,
    "press:entries=false:columns=true": 0.2,
    "press:bits=16:entries=false:columns=true": 0.2,
    "press:correct=false": 0.25,
}
AFTERWARDS = {
    "wanda:bits=4": 0.2,
    "sparsegpt:bits=3:rounding=nearest": 0.2,
    "sparsegpt:pattern=2:4:bits=4": 0.2075,
    "oats:bits=4": 0.25,
    "slim:bits=4": 0.25,
    "duo_svd@uniform:bits=4:refit_columns=true": 0.2,
    "dobi_svd:remap=false:steps=3:bits=4": 0.2,
    "soco:phase1=3:phase2=2:phase3=2:bits=8": 0.4,
    "cap:policy=none:bits=4": 0.25,
}
"""Methods that prune, trade columns or learn: what they chose goes into codes afterwards."""

OF_OTHERS = (
    "svd_llm:bits=4",
    "saes_svd:bits=4",
    "gptq",
    "caldera:turns=2",
    "press",
    "press:bits=16",
)
CASES = [
    *(("llama", method) for method in METHODS),
    *((model, method) for model in ("gpt2", "biased") for method in OF_OTHERS),
]
every_case = pytest.mark.parametrize(("model", "method"), CASES)
LATER = {"allocate", "measure", "realise", "advance", "materialise", "evaluate"}

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> codes.Walks:
    return codes.Walks(tmp_path_factory.mktemp("codes"))


@every_case
def test_what_is_stored_is_within_the_budget_and_as_large_as_it_says(
    model: str, method: str, walks: codes.Walks
) -> None:
    kept = METHODS[method]
    walk = walks.get(model, method, kept)
    check_room(walk, 0.8 * kept, kept)
    in_codes = any("codes" in entry for entry in entries_of(walk.folder).values())
    assert in_codes == (":bits=16" not in method)


@pytest.mark.parametrize("method", AFTERWARDS)
def test_what_other_methods_chose_fits_in_codes_and_loads(method: str, walks: codes.Walks) -> None:
    """Places of entries are in the budget; a learner's is the share of numbers that fits."""
    kept = AFTERWARDS[method]
    walk = walks.get("llama", method, kept)
    check_room(walk, 0.6 * kept, kept)
    for entry in entries_of(walk.folder).values():
        stored = {name for name in ("rank", "columns", "nonzeros", "base") if entry.get(name)}
        assert stored and "codes" in entry, "all that a layer stores is in codes"
    loaded = AutoModelForCausalLM.from_pretrained(walk.folder)
    assert logits_of(loaded.eval()).isfinite().all()
    assert 1 < walk.metrics()["perplexity"] < 1e4


def check_room(walk: pico.Walk, least: float, most: float) -> None:
    """Numbers and bytes are what entries say, the former between two shares, places counted."""
    job, attrs = walk.pipeline.job, walk.session.artifact(walk.pipeline.folder).attrs
    layers = {layer.name: layer for layer in job.model.layout.layers}
    dense = sum(layer.dense_cost for layer in layers.values())
    entries = entries_of(walk.folder)
    number_bits = 8 * job.model.checkpoint.torch_dtype(next(iter(job.model.stored))).itemsize
    numbers, bits, places = 0, 0, 0
    for name, layer in layers.items():
        if name not in entries:
            numbers, bits = numbers + layer.dense_cost, bits + layer.dense_cost * number_bits
            continue
        sizes = sizes_of(layer.out_features, layer.in_features, entries[name])
        numbers += numbers_of(entries[name], sizes)
        bits += bits_of(entries[name], sizes, number_bits)
        if nonzeros := entries[name].get("nonzeros"):
            places += index_bytes(sizes.out, sizes.inputs, nonzeros) // 2
    assert numbers == attrs["compressible"]
    assert least * dense < numbers + places <= most * dense
    fixed = job.model.nbytes - dense * number_bits // 8
    files = (file for file in walk.folder.glob("*.safetensors"))
    written = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert written == attrs["bytes"] == fixed + bits // 8


@every_case
def test_the_folder_loads_in_both_ways_to_the_same_numbers(
    model: str, method: str, walks: codes.Walks
) -> None:
    walk = walks.get(model, method, METHODS[method])
    found = []
    for trust in (False, True):
        pair: Any = AutoModelForCausalLM.from_pretrained(
            walk.folder, trust_remote_code=trust, output_loading_info=True
        )
        loaded, told = pair
        assert not told["missing_keys"] and not told["unexpected_keys"]
        found.append(logits_of(loaded.eval()))
    assert torch.equal(*found) and found[0].isfinite().all()
    metrics = walk.metrics()
    assert 1 < metrics["perplexity"] < 1e4 and 0 < metrics["kl"] < 10


@pytest.mark.parametrize("method", [name for name in METHODS if "columns=true" in name])
def test_layers_of_columns_are_those_of_their_shares_and_read_nothing_else(
    method: str, walks: codes.Walks
) -> None:
    walk = walks.get("llama", method, METHODS[method])
    assert isinstance(walk.pipeline.allocation, Unit)
    shares = read_shares(walk.session.artifact(walk.pipeline.allocation))
    entries = entries_of(walk.folder)
    bought = {name: share.columns for name, share in shares.items() if share.columns}
    stored = {name: x["columns"] for name, x in entries.items() if "columns" in x}
    assert bought and bought == stored
    model: Any = AutoModelForCausalLM.from_pretrained(walk.folder)
    for name, count in stored.items():
        assert entries[name]["rank"] == 0 and "nonzeros" not in entries[name]
        layer = model.get_submodule(name)
        read = layer.dense_weight().any(dim=0).nonzero().flatten()
        assert len(layer.column_index) == count
        assert set(read.tolist()) <= set(layer.column_index.tolist())
    assert 0 < kinds_of(walk.pipeline, walk.session)["columns"] < 1


@every_case
def test_again_nothing_is_computed(model: str, method: str, walks: codes.Walks) -> None:
    kept = METHODS[method]
    first = walks.get(model, method, kept)
    again = pico.walk(walks.settings(model, method, kept))
    assert again.computed == {} and again.keys == first.keys
    assert pico.scratch_left(first.session.store.root) == []


@pytest.mark.parametrize("method", METHODS)
def test_another_budget_changes_what_follows_it(method: str, walks: codes.Walks) -> None:
    kept = METHODS[method]
    one, other = (recipes_of(walks.settings("llama", method, at)) for at in (kept, kept + 0.1))
    earlier = {unit for unit in one if unit[0] not in LATER}
    assert earlier == {unit for unit in other if unit[0] not in LATER}
    assert all(one[unit] == other[unit] for unit in earlier)
    assert one["allocate", "model"] != other["allocate", "model"]


@pytest.mark.parametrize(
    "method", ["svd_llm@fisher:bits=4", "saes_svd:bits=4", "gptq:mixed=true", "press"]
)
def test_for_another_budget_what_follows_it_is_computed(method: str, walks: codes.Walks) -> None:
    first = walks.get("llama", method, METHODS[method])
    other = walks.get("llama", method, METHODS[method] + 0.1)
    assert other.computed.keys() <= LATER
    folders = [walk.session.artifact(walk.pipeline.folder).attrs for walk in (first, other)]
    assert folders[0]["compressible"] < folders[1]["compressible"]
    assert pico.scratch_left(other.session.store.root) == []


@pytest.mark.parametrize("method", ["svd_llm", "saes_svd"])
@pytest.mark.parametrize("bits", [4, 2])
def test_the_flag_is_the_option(method: str, bits: int, walks: codes.Walks) -> None:
    settings = [
        walks.settings("llama", f"{method}:bits={bits}", 0.2),
        walks.settings("llama", method, 0.2, bits=bits),
    ]
    one, other = (recipes_of(given) for given in settings)
    assert one == other


def recipes_of(settings: dict[str, Any]) -> dict[tuple[str, str], str]:
    """What is in the key of every unit but the content of what is upstream, as text."""
    pipeline, _, _ = pico.build(settings)
    return {
        (unit.stage, unit.name): json.dumps(
            unit.recipe(lambda up: up.name, lambda up, view: up.name), sort_keys=True, default=str
        )
        for group in pipeline.groups
        for unit in group.units
    }


def test_sixteen_bits_are_in_no_key(walks: codes.Walks) -> None:
    for method in ("svd_llm", "saes_svd@fisher", "wanda", "basis_sharing", "soco"):
        plain = recipes_of(walks.settings("llama", method, 0.6))
        asked = recipes_of(walks.settings("llama", f"{method}:bits=16", 0.6, bits=16))
        assert plain == asked
        for recipe in plain.values():
            settings = json.loads(recipe)["settings"]
            assert not {"coding", "bits", "group"} & settings.keys(), recipe
        allocated = json.loads(plain.get(("allocate", "model"), '{"settings": {"layers": {}}}'))
        assert all(x[3:] in ([], ["auto"]) for x in allocated["settings"]["layers"].values())


def test_what_was_measured_and_decomposed_is_the_same_whatever_the_bits(
    walks: codes.Walks,
) -> None:
    plain = recipes_of(walks.settings("llama", "svd_llm", 0.6))
    for method in ("svd_llm:bits=4", "svd_llm:bits=2:code_group=8", "svd_llm:bits=8"):
        coded = recipes_of(walks.settings("llama", method, 0.6))
        for stage in ("tokenise", "collect", "weigh", "decompose", "allocate", "realise"):
            same = all(coded[key] == recipe for key, recipe in plain.items() if key[0] == stage)
            assert same == (stage not in ("allocate", "realise")), stage


def test_methods_that_predict_share_statistics_and_gradients(walks: codes.Walks) -> None:
    press, gptq, fisher = (
        {key for key in walks.get("llama", method, METHODS[method]).keys.items()}
        for method in ("press", "gptq:mixed=true", "svd_llm@fisher:bits=4")
    )
    collected = {key for key in press if key[0][0] == "collect"}
    assert len(collected) > codes.LAYERS
    assert collected == {key for key in gptq if key[0][0] == "collect"}
    assert collected == {key for key in fisher if key[0][0] == "collect"}


@pytest.mark.parametrize(
    ("method", "bits"), [("svd_llm", 8), ("svd_llm@fisher", 4), ("saes_svd", 4)]
)
def test_with_room_for_it_every_layer_stays_whole_in_codes(
    method: str, bits: int, walks: codes.Walks
) -> None:
    walk = pico.walk(walks.settings("llama", method, 0.9, bits=bits))
    assert walk.pipeline.job.kept == 1.0
    entries = entries_of(walk.folder)
    assert len(entries) == codes.LAYERS
    for entry in entries.values():
        assert entry == {"rank": 0, "base": True, "codes": {"base": bits}, "group": 32}
    assert walk.metrics()["kl"] < {8: 1e-3, 4: 0.3}[bits]


def test_more_bits_leave_less_divergence(walks: codes.Walks) -> None:
    found = [
        walks.get("gpt2", f"{method}:bits={bits}", 0.9).metrics()["kl"]
        for method in ("rtn", "gptq")
        for bits in (8, 4, 3)
    ]
    assert found[:3] == sorted(found[:3]) and found[3:] == sorted(found[3:])
    assert found[5] < found[2]  # in 3 bits compensation shows


@pytest.mark.parametrize("shape", [(48, 40), (100, 7), (56, 32), (1536, 576)])
@pytest.mark.parametrize("bits", [8, 2])
def test_no_rank_in_codes_is_beyond_what_is_decomposed_for_16_bits(
    shape: tuple[int, int], bits: int
) -> None:
    plain = LayerRef("x", 0, *shape, "x")
    coded = replace(plain, bits=bits, group=128)
    assert coded.in_full == plain
    assert 0 < coded.paying_rank <= plain.paying_rank
    assert coded.rank_cost(coded.paying_rank) < coded.dense_cost
