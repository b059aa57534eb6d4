"""Folders whose layers hold numbers in codes, and bases: they load to the bit by either class.

A process without eigenpress loads the same folders.
"""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, Trainer, TrainingArguments

import compress_core.hf  # noqa: F401  registers the format
from compress_core.folder.export import to_dense
from compress_core.folder.memory import bytes_in_memory, expected_bytes
from compress_core.folder.write import count_parameters
from compress_core.forms.kinds import numbers_of, shapes_of, sizes_of
from compress_core.forms.linear import is_compressed
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.speed import Load, in_turns, products_per_token
from tests.families import tiny_model
from tests.pipeline.contents import coded_layers
from tests.pipeline.folders import (
    BATCH,
    Pair,
    both_ways,
    edit_config,
    entries_of,
    expect_same_tensors,
    load,
    logits_of,
    make_pair,
    make_pairs,
    without,
    without_package,
)

CASES = ["llama", "llama_tied", "llama_bias", "gpt2", "opt"]
ALONE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama: a base in 4 bits
ALL = "model.layers.0.self_attn.v_proj"  # a base, factors and entries in 3 bits
FACTORS = "model.layers.0.self_attn.k_proj"  # in 6 bits

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Dense and compressed folders of every case."""
    return make_pairs(tmp_path_factory.mktemp("coded"), CASES, coded_layers)


@pytest.fixture(scope="module")
def llama(pairs: dict[str, Pair]) -> Pair:
    return pairs["llama"]


@both_ways
@pytest.mark.parametrize("case", CASES)
def test_loading_equals_the_model_in_memory(
    case: str, trust: bool, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    pair = pairs[case]
    settings = json.loads((pair.small / "config.json").read_text())["quantization_config"]
    assert settings["format_version"] == 4
    assert {"weight", "factor_in", "base", "pivot_in", "columns", "sparse_values"} == {
        name for entry in settings["modules"].values() for name in entry["codes"]
    }
    model, found = load(pair.small, trust, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(logits_of(model), logits_of(pair.reference))
    base = AutoModel.from_pretrained(pair.small, trust_remote_code=trust)
    with torch.no_grad():
        assert torch.equal(base(BATCH)[0], pair.reference.base_model(BATCH)[0])
    model.save_pretrained(tmp_path)
    assert entries_of(tmp_path) == entries_of(pair.small)
    expect_same_tensors(tmp_path, pair.small)
    assert torch.equal(logits_of(load(tmp_path, not trust)), logits_of(model))
    halved = load(pair.small, trust, dtype=torch.bfloat16)
    codes = {b.dtype for n, b in halved.named_buffers() if n.endswith(("_codes", "_zeros"))}
    assert codes == {torch.uint8} and logits_of(halved).isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_what_is_counted_and_what_it_takes(case: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[case]
    tensors = load_file(pair.small / "model.safetensors")
    layers = {n: m for n, m in pair.reference.named_modules() if is_compressed(m)}
    numbers = sum(p.numel() for p in pair.reference.parameters()) - sum(
        p.numel() for m in layers.values() for n, p in m.named_parameters() if n != "bias"
    )
    multiplied = 0
    for name, layer in layers.items():
        entry = {k: v for k, v in entries_of(pair.small)[name].items() if k != "bias"}
        sizes = sizes_of(layer.out_features, layer.in_features, entry)
        numbers += numbers_of(entry, sizes)
        multiplied += entry["rank"] * (sizes.out + sizes.rest)
        multiplied -= entry["rank"] ** 2 if "pivot" in entry else 0
        multiplied += sizes.dense if "base" in entry else 0
        multiplied += entry.get("columns", 0) * sizes.out + entry.get("nonzeros", 0)
    assert count_parameters(pair.small).parameters == numbers == pair.summary.parameters
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert count_parameters(pair.small).nbytes == nbytes == pair.summary.nbytes
    model = load(pair.small)
    head = model.get_output_embeddings().weight.numel()
    assert products_per_token(model) == multiplied + head
    loaded = bytes_in_memory(model)
    for _ in range(2):
        logits_of(model)
    assert bytes_in_memory(model) == expected_bytes(Checkpoint(pair.small, compressed=True))
    assert loaded < bytes_in_memory(model)
    for name in layers:  # nothing that is decoded stays but where entries are
        layer = model.get_submodule(name)
        if not {"nonzeros", "pivot", "columns"} & layer.entry.keys():
            assert not list(layer.kept_tensors())


def test_without_our_package(pairs: dict[str, Pair], tmp_path: Path) -> None:
    cases = ["llama", "llama_tied", "gpt2"]
    facts, _ = without_package(pairs, cases, f"{ALL}.base_zeros", tmp_path)
    assert facts["lora"][-1] < facts["lora"][0]


@both_ways
@pytest.mark.parametrize(
    "key",
    [
        *(f"{ALONE}.{part}" for part in ("base", "base_codes", "base_zeros", "weight")),
        *(f"{FACTORS}.{part}" for part in ("weight", "weight_codes", "factor_in_zeros")),
        f"{ALL}.sparse_values_codes",
    ],
)
def test_a_missing_tensor_is_an_error(key: str, trust: bool, llama: Pair, tmp_path: Path) -> None:
    damaged = without(llama.small, tmp_path / "damaged", key)
    with pytest.raises(ValueError, match=f"no {key} "):
        load(damaged, trust)


@both_ways
def test_what_contradicts_itself_is_refused(trust: bool, llama: Pair, tmp_path: Path) -> None:
    tensors = load_file(llama.small / "model.safetensors")
    key = f"{ALL}.sparse_values_zeros"
    full = {key: tensors[key] | 0xFF}
    folder = without(llama.small, tmp_path / "bits", **full)
    with pytest.raises(ValueError, match=f"{key} has bits behind its end: the checkpoint is dam"):
        load(folder, trust)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    for entry, message in (
        ({"rank": 0, "base": True, "codes": {"base": 9}, "group": 32}, "codes of 9 bits"),
        ({"rank": 0, "base": True}, "rank 0 and a base: what is stored would not be smaller"),
        ({"rank": 9, "codes": {"base": 4}, "group": 8}, "no base that may be held in codes"),
        ({"rank": 9, "factor_in": FACTORS}, "a layer that stores more than factors \\(codes\\)"),
    ):
        modules = {**settings["modules"], ALONE: entry}
        edit_config(folder, quantization_config={**settings, "modules": modules})
        with pytest.raises(ValueError, match=message):
            load(folder, trust)


@both_ways
@pytest.mark.parametrize("case", ["llama_bias", "gpt2", "opt"])
def test_dense_again(case: str, trust: bool, pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs[case]
    want = logits_of(pair.reference)
    model = load(pair.small, trust)
    weights = {n: m.dense_weight() for n, m in model.named_modules() if is_compressed(m)}
    dense = model.dequantize()
    for name, weight in weights.items():
        layer = dense.get_submodule(name)
        found = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
        assert torch.equal(found, weight)
    dense.save_pretrained(tmp_path / "dense")
    to_dense(pair.small, tmp_path / "exported", max_shard_bytes=6000)
    for folder in (tmp_path / "dense", tmp_path / "exported"):
        assert torch.allclose(logits_of(load(folder)), want, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@both_ways
def test_generating_compiling_copies_and_lora(trust: bool, llama: Pair) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = load(llama.small, trust)
    want = logits_of(model)
    assert torch.equal(model.generate(BATCH, **options), llama.reference.generate(BATCH, **options))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(other), want)
        assert torch.allclose(logits_of(other.to(torch.float64)).float(), want, atol=1e-5)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(BATCH, use_cache=False).logits, want, atol=1e-5)
    layer, x = model.get_submodule(ALL), torch.randn(3, 32)
    lowered = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(lowered(x), layer(x), atol=1e-5)
    (speed,) = in_turns({"small": model}, [Load(2, 5, 3)], 1)["small"]
    assert speed.prefill and speed.decode
    tuned: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    tuned(BATCH, labels=BATCH).loss.backward()
    assert any(p.grad is not None for p in tuned.parameters())
    with pytest.raises(RuntimeError, match=r"must match the size|doesn't match"):
        tuned.merge_and_unload()


@both_ways
def test_scales_can_be_trained_and_codes_stay(trust: bool, llama: Pair, tmp_path: Path) -> None:
    model = load(llama.small, trust)
    codes = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = logits_of(model)
    model(BATCH, labels=BATCH).loss.backward()
    layer = model.get_submodule(ALL)
    for part in ("base", "weight", "factor_in", "sparse_values"):
        assert bool(getattr(layer, part).grad.any()), part
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0
    assert not torch.equal(logits_of(model), before)
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers())
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="fine-tun"):
        Trainer(model=load(llama.small), args=arguments)


def test_in_a_narrow_dtype_scales_are_stored_as_they_are(tmp_path: Path) -> None:
    pair = make_pair(tiny_model("llama", dtype=torch.bfloat16), tmp_path, layers=coded_layers)
    model = load(pair.small)
    for name, module in model.named_modules():
        if is_compressed(module):
            stored = {n: tuple(t.shape) for n, t in module.tensors().items()}
            assert stored == shapes_of(module.entry, module.sizes), name
            assert module.weight.dtype is torch.bfloat16
    wanted = pair.reference.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    with torch.inference_mode():
        model(BATCH)
    assert bytes_in_memory(model) == expected_bytes(Checkpoint(pair.small, compressed=True))
