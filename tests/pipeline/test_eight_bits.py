"""Layers with factors in 8 bits: what one computes, and that folders with them load to the bit."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import compress_core.hf  # noqa: F401  registers the format
from compress_core.errors import ModelError
from compress_core.folder.export import to_dense
from compress_core.folder.memory import bytes_in_memory, expected_bytes
from compress_core.folder.write import count_parameters
from compress_core.forms.eight_bits import EightBits
from compress_core.forms.linear import CompressedLinear, is_compressed
from compress_core.hf.checkpoint import Checkpoint
from tests.pipeline.contents import eight_bit_layers
from tests.pipeline.folders import (
    BATCH,
    Pair,
    both_ways,
    edit_config,
    entries_of,
    expect_same_tensors,
    load,
    logits_of,
    make_pairs,
    without,
    without_package,
)

CODES = ("codes_out", "codes_in")
CASES = ["llama_tied", "llama", "llama_bias", "gpt2_prefixless", "opt", "phi3"]
LAYER = "model.layers.0.mlp.up_proj"  # of the tiny Llama: (48, 32), so that rest_out is there

shapes = pytest.mark.parametrize("sizes", [(24, 40), (40, 24), (24, 24)], ids=str)

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Dense and compressed folders of every case."""
    return make_pairs(tmp_path_factory.mktemp("eight"), CASES, eight_bit_layers)


@pytest.fixture(scope="module")
def llama(pairs: dict[str, Pair]) -> Pair:
    return pairs["llama"]


def layer_with(sizes: tuple[int, int], rank: int = 9, dtype: torch.dtype = torch.float32) -> Any:
    """A layer of (out, in) and the codes of random factors."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(sizes[0], rank, generator=generator)
    v = torch.randn(rank, sizes[1], generator=generator)
    layer: Any = CompressedLinear(sizes[1], sizes[0], {"rank": rank, "bits": 8}, dtype=dtype)
    with torch.no_grad():
        layer.bias.normal_(generator=generator)
        for part, tensor in EightBits.pack(u, v, dtype).items():
            getattr(layer, part).copy_(tensor)
    assert torch.allclose(layer.dense_weight().float(), u @ v, atol=0.5)
    return layer


@shapes
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (0,)])
def test_forward_is_the_dense_product(sizes: tuple[int, int], shape: tuple[int, ...]) -> None:
    layer = layer_with(sizes)
    x = torch.randn(*shape, sizes[1], requires_grad=True)
    want = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    assert torch.allclose(layer(x), want, atol=1e-4)
    goal = torch.randn(*shape, sizes[0])
    inputs = [x, *layer.parameters()]
    assert len(inputs) == 3 + (sizes[0] != sizes[1])
    found = torch.autograd.grad((layer(x) * goal).sum(), inputs)
    direct = torch.autograd.grad((want * goal).sum(), inputs)
    assert all(torch.allclose(f, d, atol=1e-3) for f, d in zip(found, direct, strict=True))


@shapes
def test_codes_stay_what_they_are_through_casts_and_copies(sizes: tuple[int, int]) -> None:
    layer = layer_with(sizes)
    codes = layer.codes_out.clone()
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        other: Any = cast(copy.deepcopy(layer))
        assert other.weight.dtype != torch.float32
        found = other(torch.ones(2, sizes[1], dtype=other.weight.dtype))
        assert torch.allclose(found.float(), layer(torch.ones(2, sizes[1])), rtol=0.05, atol=1.0)
        assert other.codes_out.dtype is torch.int8 and torch.equal(other.codes_out, codes)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(torch.ones(1, sizes[1])), layer(torch.ones(1, sizes[1])))
    layer.requires_grad_(True)  # which a parameter of integers would not survive
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(1, sizes[1])).dtype is torch.bfloat16


@shapes
def test_it_compiles_exports_and_is_built_on_the_meta_device(sizes: tuple[int, int]) -> None:
    layer, x = layer_with(sizes), torch.randn(3, sizes[1])
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    assert torch.allclose(torch.export.export(layer, (x,)).module()(x), layer(x), atol=1e-5)
    with torch.device("meta"):
        empty = CompressedLinear(sizes[1], sizes[0], {"rank": 9, "bits": 8})
    assert empty(torch.empty(2, sizes[1], device="meta")).shape == (2, sizes[0])
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    assert bool(
        CompressedLinear(sizes[1], sizes[0], {"rank": 9, "bits": 8})(x).isnan().all()
    )  # until it is loaded
    assert is_compressed(layer) and repr(layer).endswith("rank=9, bits=8, bias=True)")


@pytest.mark.parametrize("case", CASES)
def test_two_codes_count_as_one_number_and_bytes_as_bytes(
    case: str, pairs: dict[str, Pair]
) -> None:
    pair = pairs[case]
    tensors = load_file(pair.small / "model.safetensors")
    codes = {key: t for key, t in tensors.items() if key.rpartition(".")[2] in CODES}
    assert codes and all(tensor.dtype is torch.int8 for tensor in codes.values())
    numbers = sum(tensor.numel() for key, tensor in tensors.items() if key not in codes)
    numbers += sum(tensor.numel() for tensor in codes.values()) // 2
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert count_parameters(pair.small).parameters == numbers == pair.summary.parameters
    assert count_parameters(pair.small).nbytes == nbytes == pair.summary.nbytes
    expected = expected_bytes(Checkpoint(pair.small, compressed=True))
    model = load(pair.small)
    logits_of(model)
    assert bytes_in_memory(model) == expected < expected_bytes(Checkpoint(pair.dense))
    kinds = [entry.get("bits") for entry in entries_of(pair.small).values()]
    assert kinds.count(8) == len(kinds) - 1


@both_ways
@pytest.mark.parametrize("case", CASES)
def test_loading_equals_the_model_in_memory(
    case: str, trust: bool, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    pair = pairs[case]
    model, found = load(pair.small, trust, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(logits_of(model), logits_of(pair.reference))
    model.save_pretrained(tmp_path)
    assert entries_of(tmp_path) == entries_of(pair.small)
    if not case.endswith("_prefixless"):
        expect_same_tensors(tmp_path, pair.small)
    assert torch.equal(logits_of(load(tmp_path, not trust)), logits_of(model))
    halved = load(pair.small, trust, dtype=torch.bfloat16)
    kinds = {b.dtype for n, b in halved.named_buffers() if n.rpartition(".")[2] in CODES}
    assert kinds == {torch.int8}
    assert logits_of(halved).isfinite().all()


def test_without_our_package(pairs: dict[str, Pair], tmp_path: Path) -> None:
    cases = ["llama", "llama_tied", "opt"]
    facts, _ = without_package(pairs, cases, f"{LAYER}.codes_in", tmp_path)
    assert facts["lora"][-1] < facts["lora"][0]


@both_ways
@pytest.mark.parametrize("part", ["weight", "codes_out", "codes_in", "rest_out"])
def test_a_missing_tensor_is_an_error(part: str, trust: bool, llama: Pair, tmp_path: Path) -> None:
    damaged = without(llama.small, tmp_path / "damaged", f"{LAYER}.{part}")
    with pytest.raises(ValueError, match=f"no {LAYER}.{part} "):
        load(damaged, trust)


@both_ways
def test_other_bits_and_ranks_that_do_not_pay_are_refused(
    trust: bool, llama: Pair, tmp_path: Path
) -> None:
    folder = without(llama.small, tmp_path / "changed")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    for entry, message in (
        ({"rank": 31, "bits": 4}, "this code knows no bits=4"),
        ({"rank": 32, "bits": 8}, "would not be smaller"),
        ({"rank": 31, "bits": 8, "columns": 1}, "rank 31 and 1 columns: .* would not be"),
    ):
        modules = {**settings["modules"], LAYER: entry}
        edit_config(folder, quantization_config={**settings, "modules": modules})
        with pytest.raises(ValueError, match=message):
            load(folder, trust)


@both_ways
@pytest.mark.parametrize("case", ["llama_bias", "gpt2_prefixless", "opt"])
def test_dense_again(case: str, trust: bool, pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs[case]
    want = logits_of(pair.reference)
    load(pair.small, trust).dequantize().save_pretrained(tmp_path / "dense")
    to_dense(pair.small, tmp_path / "exported", max_shard_bytes=6000)
    for folder in (tmp_path / "dense", tmp_path / "exported"):
        loaded, found = load(folder, output_loading_info=True)
        assert not any(is_compressed(module) for module in loaded.modules())
        assert not found["missing_keys"] and not found["unexpected_keys"]
        assert torch.allclose(logits_of(loaded), want, atol=1e-4)
    with pytest.raises(ModelError, match="already compressed"):
        Checkpoint(pair.small)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@both_ways
def test_generating_compiling_and_lora(trust: bool, llama: Pair) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = load(llama.small, trust)
    assert torch.equal(model.generate(BATCH, **options), llama.reference.generate(BATCH, **options))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(BATCH, use_cache=False).logits, logits_of(model), atol=1e-5)
    tuned: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    tuned(BATCH, labels=BATCH).loss.backward()
    assert any(p.grad is not None for p in tuned.parameters())
    with pytest.raises(RuntimeError, match=r"must match the size|doesn't match"):
        tuned.merge_and_unload()


def test_the_trainer_wants_an_adapter_where_codes_are_fixed(llama: Pair, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="fine-tun"):
        Trainer(model=load(llama.small), args=arguments)
