"""A compressed folder loads as the stock class and by its own code, to the bit, or not at all.

Every family of `tests.families` goes through both ways; a second process in which eigenpress
cannot be imported loads the same folders, so that nothing passes only because our package is there.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import compress_core.hf  # noqa: F401  registers the format
from compress_core.errors import ModelError
from compress_core.folder.export import to_dense
from compress_core.folder.write import count_parameters
from compress_core.forms.linear import is_compressed
from tests.families import FAMILIES, linear_names, tiny_model
from tests.pipeline.folders import (
    BATCH,
    Pair,
    edit_config,
    logits_of,
    make_pairs,
    random_factors,
    run_without_package,
    write_small,
)

CASES = [*FAMILIES, "gpt2_prefixless"]
RESAVED = ["llama_tied", "gpt2", "gpt2_prefixless", "gpt_neox"]

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Dense and compressed folders of every case."""
    return make_pairs(tmp_path_factory.mktemp("families"), CASES)


@pytest.fixture(scope="module")
def stock(pairs: dict[str, Pair]) -> dict[str, Any]:
    """Every compressed folder as the stock class."""
    return {case: AutoModelForCausalLM.from_pretrained(pair.small) for case, pair in pairs.items()}


@pytest.fixture(scope="module")
def outside(
    pairs: dict[str, Pair], stock: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a process without eigenpress finds: `logits`, `facts`, and the folders it saved."""
    root = tmp_path_factory.mktemp("outside")
    folders = {case: pair.small for case, pair in pairs.items()}
    for case in RESAVED:
        folders[f"{case}/by_stock"] = root / f"{case}_by_stock"
        stock[case].save_pretrained(folders[f"{case}/by_stock"])
        folders[f"{case}/dense"] = root / f"{case}_dense"
        to_dense(pairs[case].small, folders[f"{case}/dense"])
    resave = {case: str(root / f"{case}_by_remote") for case in RESAVED}
    damaged = damage(pairs["llama"].small, root / "damaged")
    newer = root / "newer"
    stock["llama"].save_pretrained(newer)
    settings = json.loads((newer / "config.json").read_text())["quantization_config"]
    edit_config(newer, quantization_config={**settings, "format_version": 5})
    request = {
        "batch": BATCH.tolist(),
        "families": {case: str(folder) for case, folder in folders.items()},
        "resave": resave,
        "damaged": str(damaged),
        "newer": str(newer),
    }
    run_without_package(root, request)
    return {
        "logits": load_file(root / "logits.safetensors"),
        "facts": json.loads((root / "facts.json").read_text()),
        "resave": {case: Path(folder) for case, folder in resave.items()},
        "newer": newer,
        "damaged": damaged,
    }


def damage(small: Path, target: Path) -> Path:
    """A copy of a compressed folder from which one in-factor is gone."""
    target.mkdir()
    for file in small.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.factor_in"]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("case", CASES)
def test_stock_class_equals_the_model_in_memory(
    case: str, pairs: dict[str, Pair], stock: dict[str, Any]
) -> None:
    model, reference = stock[case], pairs[case].reference
    assert type(model) is type(reference)
    assert sum(is_compressed(module) for module in model.modules()) == len(linear_names(reference))
    assert torch.equal(logits_of(model), logits_of(reference))
    tied = reference.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("case", CASES)
def test_code_in_the_folder_needs_no_package(
    case: str, pairs: dict[str, Pair], outside: dict[str, Any]
) -> None:
    reference = pairs[case].reference
    module, name = outside["facts"]["class"][case]
    assert module.startswith("transformers_modules.") and name == type(reference).__name__
    assert torch.equal(outside["logits"][case], logits_of(reference))
    with torch.no_grad():
        hidden = reference.base_model(BATCH).last_hidden_state
    assert torch.equal(outside["logits"][f"{case}/base"], hidden)
    # The one warning is transformers' own: that it does not know the quantization type.
    assert all("quantization" in line for line in outside["facts"]["messages"][case])


@pytest.mark.parametrize("case", CASES)
def test_stock_class_without_our_code_refuses(case: str, outside: dict[str, Any]) -> None:
    error = outside["facts"]["guard"][case]
    assert error.startswith("RuntimeError") and "mismatch" in error


@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_the_safetensors(case: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[case]
    tensors = load_file(pair.small / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert (pair.summary.parameters, pair.summary.nbytes) == (parameters, nbytes)
    assert parameters == pair.reference.num_parameters()
    assert parameters < count_parameters(pair.dense).parameters
    assert pair.summary.layers == len(linear_names(pair.reference))


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox"])
def test_code_in_the_folder_and_package_together(case: str, pairs: dict[str, Pair]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pairs[case].small, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert torch.equal(logits_of(model), logits_of(pairs[case].reference))


@pytest.mark.parametrize("case", ["llama", "gpt2_prefixless", "opt"])
def test_base_model_alone_as_stock_class(case: str, pairs: dict[str, Pair]) -> None:
    base, reference = AutoModel.from_pretrained(pairs[case].small), pairs[case].reference.base_model
    assert type(base) is type(reference)
    with torch.no_grad():
        assert torch.equal(base(BATCH)[0], reference(BATCH)[0])


@pytest.mark.parametrize("case", RESAVED)
def test_saving_again_keeps_both_ways_of_loading(
    case: str, pairs: dict[str, Pair], outside: dict[str, Any]
) -> None:
    want = logits_of(pairs[case].reference)
    by_remote = AutoModelForCausalLM.from_pretrained(outside["resave"][case])
    assert torch.equal(logits_of(by_remote), want)
    again = AutoModelForCausalLM.from_pretrained(outside["resave"][case], trust_remote_code=True)
    assert type(again).__module__.startswith("transformers_modules.")
    assert torch.equal(logits_of(again), want)
    assert torch.equal(outside["logits"][f"{case}/by_stock"], want)
    original = json.loads((pairs[case].small / "config.json").read_text())
    assert outside["facts"]["quantization_config"][case] == original["quantization_config"]


@pytest.mark.parametrize("case", RESAVED)
def test_dense_export_is_an_ordinary_checkpoint(
    case: str, pairs: dict[str, Pair], outside: dict[str, Any]
) -> None:
    dense = outside["logits"][f"{case}/dense"]
    assert torch.allclose(dense, logits_of(pairs[case].reference), atol=1e-5, rtol=0)
    assert outside["facts"]["messages"][f"{case}/dense"] == []
    assert outside["facts"]["class"][f"{case}/dense"][0].startswith("transformers.")


def test_newer_format_is_refused_everywhere(outside: dict[str, Any], tmp_path: Path) -> None:
    assert "format 5" in outside["facts"]["newer"]
    with pytest.raises(ValueError, match="format 5"):
        AutoModelForCausalLM.from_pretrained(outside["newer"])
    with pytest.raises(ModelError, match="format 5"):
        to_dense(outside["newer"], tmp_path / "dense")


def test_missing_factor_never_becomes_a_random_one(outside: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no model\.layers\.0\.mlp\.up_proj\.factor_in"):
        AutoModelForCausalLM.from_pretrained(outside["damaged"])
    assert "no model.layers.0.mlp.up_proj.factor_in" in outside["facts"]["damaged"]
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.0\.mlp\.up_proj\.factor_in'"):
        to_dense(outside["damaged"], outside["damaged"].parent / "dense")


def test_lora_trains_on_the_code_in_the_folder(outside: dict[str, Any]) -> None:
    assert outside["facts"]["lora"][-1] < outside["facts"]["lora"][0]


@pytest.mark.parametrize(
    ("rank", "error"),
    [(-1, ValueError), (10_000, ValueError), (3, RuntimeError), (0, RuntimeError)],
)
def test_wrong_rank_is_refused(
    rank: int, error: type[Exception], pairs: dict[str, Pair], tmp_path: Path
) -> None:
    small = pairs["llama"].small
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((small / "config.json").read_text())["quantization_config"]
    settings["modules"]["model.layers.1.self_attn.k_proj"]["rank"] = rank
    edit_config(tmp_path, quantization_config=settings)
    with pytest.raises(error):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_writing_twice_gives_equal_bytes_whatever_the_order(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    factors = random_factors(model)
    write_small(tmp_path / "dense", tmp_path / "one", factors)
    write_small(tmp_path / "dense", tmp_path / "two", dict(reversed(factors.items())))
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert "modeling_eigenpress.py" in names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_shards_hold_what_one_file_holds(pairs: dict[str, Pair], tmp_path: Path) -> None:
    model, pair = tiny_model("llama"), pairs["llama"]
    limit = 12_300
    write_small(pair.dense, tmp_path / "shards", random_factors(model), shard=limit)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 4 and not (tmp_path / "shards" / "model.safetensors").exists()
    sharded = {key: tensor for file in files for key, tensor in load_file(file).items()}
    whole = load_file(pair.small / "model.safetensors")
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[key], whole[key]) for key in whole)
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= limit
    assert count_parameters(tmp_path / "shards") == count_parameters(pair.small)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits_of(loaded), logits_of(pair.reference))
    to_dense(tmp_path / "shards", tmp_path / "dense", max_shard_bytes=limit)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.allclose(logits_of(dense), logits_of(pair.reference), atol=1e-5, rtol=0)
