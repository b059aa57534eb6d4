"""Folders whose layers have sparse entries, new biases or nothing: small, and loaded to the bit.

`sparse_layers` gives every model all kinds. A process without eigenpress loads the same folders.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

import compress_core.hf  # noqa: F401  registers the format
from compress_core.errors import ModelError
from compress_core.folder.export import to_dense
from compress_core.folder.write import count_parameters
from compress_core.sparse import PLACES, index_bytes
from tests.families import tiny_model
from tests.pipeline.contents import sparse_layers
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
    write_layers,
)

CASES = ["llama_tied", "llama", "llama_bias", "gpt2_prefixless", "gpt2", "opt"]
BITS = "model.layers.0.self_attn.q_proj"  # of the tiny Llama: entries alone, half of all
COLUMNS = "model.layers.0.mlp.down_proj"  # few entries in 48 columns
BESIDE = "model.layers.0.self_attn.k_proj"  # beside factors, with a new bias


pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Dense and compressed folders of every case."""
    return make_pairs(tmp_path_factory.mktemp("sparse"), CASES, sparse_layers)


@pytest.fixture(scope="module")
def llama(pairs: dict[str, Pair]) -> Pair:
    return pairs["llama"]


@pytest.mark.parametrize("case", CASES)
def test_entries_count_as_numbers_and_places_as_bytes(case: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[case]
    tensors = load_file(pair.small / "model.safetensors")
    places = {key: t for key, t in tensors.items() if key.rpartition(".")[2] in PLACES}
    numbers = sum(tensor.numel() for key, tensor in tensors.items() if key not in places)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert count_parameters(pair.small).parameters == numbers == pair.summary.parameters
    assert count_parameters(pair.small).nbytes == nbytes == pair.summary.nbytes
    assert numbers == pair.reference.num_parameters()
    for name, entry in entries_of(pair.small).items():
        layer = pair.reference.get_submodule(name)
        assert ("bias" in entry) == ("bias" in layer.entry)
        if "nonzeros" in entry:
            sizes = layer.out_features, layer.in_features
            mine = [t for key, t in places.items() if name.endswith(key.rpartition(".")[0])]
            assert sum(t.nbytes for t in mine) == index_bytes(*sizes, entry["nonzeros"])


@both_ways
@pytest.mark.parametrize("case", CASES)
def test_loading_equals_the_model_in_memory(
    case: str, trust: bool, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    pair = pairs[case]
    model, found = load(pair.small, trust, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(logits_of(model), logits_of(pair.reference))
    for (name, one), (other, two) in zip(
        sorted(model.named_buffers()), sorted(pair.reference.named_buffers()), strict=True
    ):
        assert name == other and one.dtype == two.dtype and torch.equal(one, two)
        assert one.dtype != torch.int16  # which DistributedDataParallel cannot broadcast

    model.save_pretrained(tmp_path)
    assert entries_of(tmp_path) == entries_of(pair.small)
    if not case.endswith("_prefixless"):
        expect_same_tensors(tmp_path, pair.small)
    for again_trust in (False, True):
        again = load(tmp_path, again_trust)
        assert torch.equal(logits_of(again), logits_of(model))


@both_ways
@pytest.mark.parametrize("case", ["llama", "gpt2_prefixless", "opt"])
def test_base_model_alone(case: str, trust: bool, pairs: dict[str, Pair]) -> None:
    pair = pairs[case]
    base = AutoModel.from_pretrained(pair.small, trust_remote_code=trust)
    with torch.no_grad():
        assert torch.equal(base(BATCH)[0], pair.reference.base_model(BATCH)[0])


def test_without_our_package(pairs: dict[str, Pair], tmp_path: Path) -> None:
    cases = ["llama", "llama_tied", "gpt2", "opt"]
    facts, logits = without_package(pairs, cases, f"{BITS}.sparse_bits", tmp_path)
    for case in cases:
        assert all("quantization" in line for line in facts["messages"][case])
        assert facts["guard"][case].startswith("RuntimeError")
        assert torch.equal(logits_of(load(tmp_path / case)), logits[case])
    assert facts["lora"][-1] < facts["lora"][0]


def test_a_layer_of_entries_alone_is_refused_by_a_class_that_knows_nothing(
    llama: Pair, tmp_path: Path
) -> None:
    """Its out-factor is empty and still has the dense weight's name and not its shape."""
    model = tiny_model("llama")
    one = [layer for layer in sparse_layers(model) if layer.name == BITS]
    write_layers(llama.dense, tmp_path / "one", one)
    shape = load_file(tmp_path / "one" / "model.safetensors")[f"{BITS}.weight"].shape
    assert tuple(shape) == (32, 0)
    edit_config(tmp_path / "one", quantization_config=None, auto_map=None)
    with pytest.raises(RuntimeError, match="mismatch"):
        load(tmp_path / "one")


@both_ways
@pytest.mark.parametrize(
    "key",
    [
        f"{BITS}.weight",
        f"{BITS}.sparse_values",
        f"{BITS}.sparse_bits",
        f"{COLUMNS}.sparse_columns",
        f"{COLUMNS}.sparse_counts",
        f"{BESIDE}.bias",
    ],
)
def test_a_missing_tensor_is_an_error(key: str, trust: bool, llama: Pair, tmp_path: Path) -> None:
    damaged = without(llama.small, tmp_path / "damaged", key)
    with pytest.raises(ValueError, match=f"no {key} "):
        load(damaged, trust)
    with pytest.raises(ModelError, match=r"no tensor|got a bias"):
        to_dense(damaged, tmp_path / "dense")


def _broken(llama: Pair, part: str) -> tuple[str, Tensor]:
    tensors = load_file(llama.small / "model.safetensors")
    bits, columns = tensors[f"{BITS}.sparse_bits"], tensors[f"{COLUMNS}.sparse_columns"]
    counts = tensors[f"{COLUMNS}.sparse_counts"]
    return {
        "one more bit": (f"{BITS}.sparse_bits", bits ^ (torch.arange(len(bits)) == 5).byte()),
        "a longer mask": (f"{BITS}.sparse_bits", torch.cat([bits, bits[:1]])),
        "a column twice": (f"{COLUMNS}.sparse_columns", torch.zeros_like(columns)),
        "a column beyond": (f"{COLUMNS}.sparse_columns", columns + 48),
        "another count": (f"{COLUMNS}.sparse_counts", counts + 1),
    }[part]


@both_ways
@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        ("one more bit", ValueError, r"places of 51[13] entries for 512 values"),
        ("a longer mask", RuntimeError, "mismatch"),
        ("a column twice", ValueError, "named twice"),
        ("a column beyond", ValueError, "of 48"),
        ("another count", ValueError, "columns in rows that count"),
    ],
)
def test_damaged_places_are_an_error(
    part: str,
    kind: type[Exception],
    message: str,
    trust: bool,
    pairs: dict[str, Pair],
    tmp_path: Path,
) -> None:
    key, tensor = _broken(pairs["llama_bias"], part)
    damaged = without(pairs["llama_bias"].small, tmp_path / "damaged", **{key: tensor})
    with pytest.raises(kind, match=message) as caught:
        load(damaged, trust)
    if kind is ValueError:
        assert "damaged, get the model again" in str(caught.value)
    with pytest.raises(ModelError, match="damaged, get it again"):
        to_dense(damaged, tmp_path / "dense")


@both_ways
def test_shards_low_memory_and_another_dtype(trust: bool, llama: Pair, tmp_path: Path) -> None:
    model = tiny_model("llama")
    small = tmp_path / "shards"
    write_layers(llama.dense, small, sparse_layers(model), shard=6000)
    assert len(list(small.glob("*.safetensors"))) > 4
    for options in ({}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}):
        assert torch.equal(logits_of(load(small, trust, **options)), logits_of(llama.reference))
    halved = load(small, trust, dtype=torch.bfloat16)
    layer = halved.get_submodule(COLUMNS)
    assert (layer.sparse_values.dtype, layer.sparse_columns.dtype) == (torch.bfloat16, torch.int32)
    assert logits_of(halved).isfinite().all()
    halved.save_pretrained(tmp_path / "again", max_shard_size="4kB")
    assert torch.equal(logits_of(load(tmp_path / "again", not trust)), logits_of(halved))
