"""Folders whose layers keep columns or share an in-factor: stored once, loaded to the bit.

`varied_layers` gives every model both kinds beside plain factors. A process without eigenpress
loads the same folders.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

import compress_core.hf  # noqa: F401  registers the format
from compress_core.errors import ModelError
from compress_core.folder.export import to_dense
from compress_core.folder.write import count_parameters
from tests.families import tiny_model
from tests.pipeline.contents import varied_layers
from tests.pipeline.folders import (
    BATCH,
    Pair,
    both_ways,
    entries_of,
    expect_same_tensors,
    expect_shared,
    load,
    logits_of,
    make_pairs,
    shared_of,
    without,
    without_package,
    write_layers,
)

CASES = ["llama", "llama_tied", "gpt2", "gpt2_prefixless", "gpt_neox", "opt"]
OWNER = "model.layers.0.self_attn.q_proj"  # of the tiny Llama, as is the next
KEEPER = "model.layers.1.self_attn.k_proj"


pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Dense and compressed folders of every case."""
    return make_pairs(tmp_path_factory.mktemp("varied"), CASES, varied_layers)


@pytest.fixture(scope="module")
def llama(pairs: dict[str, Pair]) -> Pair:
    return pairs["llama"]


@contextmanager
def messages() -> Iterator[list[str]]:
    """What transformers says in the block, at the level of warnings."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler(logging.WARNING)
    transformers_logging.add_handler(handler)
    yield lines
    transformers_logging.remove_handler(handler)


@pytest.mark.parametrize("case", CASES)
def test_a_shared_factor_is_stored_once_and_an_index_narrow(
    case: str, pairs: dict[str, Pair]
) -> None:
    pair = pairs[case]
    tensors = load_file(pair.small / "model.safetensors")
    factors = [key for key in tensors if key.endswith(".factor_in")]
    entries, shared = entries_of(pair.small), shared_of(pair.small)
    assert len(factors) == len(entries) - len(shared)
    kept = [name for name, entry in entries.items() if "columns" in entry]
    indices = [tensor for key, tensor in tensors.items() if key.endswith(".column_index")]
    assert len(indices) == len(kept) > 2
    assert {index.dtype for index in indices} == {torch.int16}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert pair.summary.parameters == count_parameters(pair.small).parameters == numbers
    assert numbers == pair.reference.num_parameters() + 3 * len(kept)


@both_ways
@pytest.mark.parametrize("case", CASES)
def test_loading_equals_the_model_in_memory(
    case: str, trust: bool, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    pair = pairs[case]
    with messages() as said:
        model, found = load(pair.small, trust, output_loading_info=True)
    assert said == [] and not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(logits_of(model), logits_of(pair.reference))
    expect_shared(model, pair.small)
    assert model.num_parameters() == pair.reference.num_parameters()
    tied = model.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.tie_weights()
    expect_shared(model, pair.small)

    model.save_pretrained(tmp_path)
    assert entries_of(tmp_path) == entries_of(pair.small)
    if not case.endswith("_prefixless"):
        expect_same_tensors(tmp_path, pair.small)
    for again_trust in (False, True):
        again = load(tmp_path, again_trust)
        expect_shared(again, pair.small)
        assert torch.equal(logits_of(again), logits_of(model))


@both_ways
@pytest.mark.parametrize("case", ["llama", "gpt2_prefixless", "opt"])
def test_base_model_alone(case: str, trust: bool, pairs: dict[str, Pair]) -> None:
    pair = pairs[case]
    base = AutoModel.from_pretrained(pair.small, trust_remote_code=trust)
    reference = pair.reference.base_model
    with torch.no_grad():
        assert torch.equal(base(BATCH)[0], reference(BATCH)[0])
    expect_shared(base, pair.small, prefix=f"{pair.reference.base_model_prefix}.")


def test_without_our_package(pairs: dict[str, Pair], tmp_path: Path) -> None:
    cases = ["llama", "llama_tied", "gpt2"]
    facts, logits = without_package(pairs, cases, f"{KEEPER}.columns", tmp_path)
    for case in cases:
        assert all("quantization" in line for line in facts["messages"][case])
        assert torch.equal(logits_of(load(tmp_path / case)), logits[case])
    assert facts["lora"][-1] < facts["lora"][0]


@both_ways
@pytest.mark.parametrize(
    "key", [f"{KEEPER}.columns", f"{KEEPER}.column_index", f"{OWNER}.factor_in"]
)
def test_a_missing_tensor_is_an_error(key: str, trust: bool, llama: Pair, tmp_path: Path) -> None:
    damaged = without(llama.small, tmp_path / "damaged", key)
    with pytest.raises(ValueError, match=f"no {key} "):
        load(damaged, trust)
    with pytest.raises(ModelError, match=f"no tensor '{key}'"):
        to_dense(damaged, tmp_path / "dense")


@both_ways
@pytest.mark.parametrize("index", [[3, 2, 1], [1, 1, 2], [-1, 2, 3], [1, 2, 32]])
def test_a_damaged_index_is_an_error(
    index: list[int], trust: bool, llama: Pair, tmp_path: Path
) -> None:
    key = f"{KEEPER}.column_index"
    changed = {key: torch.tensor(index, dtype=torch.int16)}
    damaged = without(llama.small, tmp_path / "damaged", **changed)
    with pytest.raises(ValueError, match=f"{key} is no ascending list"):
        load(damaged, trust)
    with pytest.raises(ModelError, match=f"{key} is no ascending list .* is damaged"):
        to_dense(damaged, tmp_path / "dense")


@both_ways
def test_shards_low_memory_and_another_dtype(trust: bool, llama: Pair, tmp_path: Path) -> None:
    model = tiny_model("llama")
    small = tmp_path / "shards"
    write_layers(llama.dense, small, varied_layers(model), shard=6000)
    assert len(list(small.glob("*.safetensors"))) > 4
    for options in ({}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}):
        loaded = load(small, trust, **options)
        assert torch.equal(logits_of(loaded), logits_of(llama.reference))
        expect_shared(loaded, small)
    halved = load(small, trust, dtype=torch.bfloat16)
    expect_shared(halved, small)
    layer = halved.get_submodule(KEEPER)
    assert (layer.columns.dtype, layer.column_index.dtype) == (torch.bfloat16, torch.int32)
    assert logits_of(halved).isfinite().all()
    halved.save_pretrained(tmp_path / "again", max_shard_size="4kB")
    again = load(tmp_path / "again", not trust)
    assert torch.equal(logits_of(again), logits_of(halved))
    expect_shared(again, small)
