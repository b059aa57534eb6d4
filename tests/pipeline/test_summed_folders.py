"""Folders whose layers hold kinds of parts together that older formats kept apart.

`summed_layers` gives every model columns beside entries, and factors in 8 bits beside either. A
process without eigenpress loads the same folders.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

import compress_core.hf  # noqa: F401  registers the format
from compress_core.errors import ModelError
from compress_core.folder.export import to_dense
from compress_core.folder.memory import bytes_in_memory, expected_bytes
from compress_core.folder.write import count_parameters
from compress_core.forms.kinds import kinds_of, version_of
from compress_core.forms.linear import is_compressed
from compress_core.hf.checkpoint import Checkpoint
from tests.families import tiny_model
from tests.pipeline.contents import (
    eight_bit_layers,
    sparse_layers,
    summed_layers,
    varied_layers,
)
from tests.pipeline.folders import (
    BATCH,
    Pair,
    both_ways,
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
ALL = "model.layers.0.self_attn.k_proj"  # of the tiny Llama: 8 bits, columns and entries
ALONE = "model.layers.0.self_attn.v_proj"  # columns and entries, no product

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Dense and compressed folders of every case."""
    return make_pairs(tmp_path_factory.mktemp("summed"), CASES, summed_layers)


@pytest.fixture(scope="module")
def llama(pairs: dict[str, Pair]) -> Pair:
    return pairs["llama"]


def _in_words(folder: Path) -> set[frozenset[str]]:
    """Which kinds of parts are together in a layer."""
    entries = entries_of(folder).values()
    return {frozenset(kind.words for kind in kinds_of(entry)) for entry in entries}


@both_ways
@pytest.mark.parametrize("case", CASES)
def test_loading_equals_the_model_in_memory(
    case: str, trust: bool, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    pair = pairs[case]
    columns, entries, coded = "kept columns", "sparse entries", "factors in 8 bits"
    pivots = "factors in pivot form"
    assert _in_words(pair.small) == {
        frozenset({pivots, columns, entries}),
        frozenset({coded, columns, entries}),
        frozenset({"factors", columns, entries}),
        frozenset({pivots, columns}),
        frozenset({coded, entries}),
        frozenset({pivots}),
    }
    model, found = load(pair.small, trust, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(logits_of(model), logits_of(pair.reference))
    base = AutoModel.from_pretrained(pair.small, trust_remote_code=trust)
    with torch.no_grad():
        assert torch.equal(base(BATCH)[0], pair.reference.base_model(BATCH)[0])
    expected = expected_bytes(Checkpoint(pair.small, compressed=True))
    assert bytes_in_memory(model) == expected
    assert count_parameters(pair.small).parameters == pair.summary.parameters
    model.save_pretrained(tmp_path)
    assert entries_of(tmp_path) == entries_of(pair.small)
    expect_same_tensors(tmp_path, pair.small)
    assert torch.equal(logits_of(load(tmp_path, not trust)), logits_of(model))
    halved = load(pair.small, trust, dtype=torch.bfloat16)
    assert logits_of(halved).isfinite().all()


def test_without_our_package(pairs: dict[str, Pair], tmp_path: Path) -> None:
    cases = ["llama", "llama_tied", "gpt2"]
    facts, _ = without_package(pairs, cases, f"{ALL}.columns", tmp_path)
    assert facts["lora"][-1] < facts["lora"][0]


@both_ways
@pytest.mark.parametrize(
    "key",
    [
        *(f"{ALL}.{part}" for part in ("weight", "codes_in", "codes_out", "rest_in")),
        *(f"{ALL}.{part}" for part in ("columns", "column_index", "sparse_values")),
        f"{ALONE}.sparse_bits",
    ],
)
def test_a_missing_tensor_is_an_error(key: str, trust: bool, llama: Pair, tmp_path: Path) -> None:
    damaged = without(llama.small, tmp_path / "damaged", key)
    with pytest.raises(ValueError, match=f"no {key} "):
        load(damaged, trust)


@both_ways
@pytest.mark.parametrize("case", ["llama", "llama_bias", "gpt2", "opt"])
def test_dense_again(case: str, trust: bool, pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs[case]
    want = logits_of(pair.reference)
    model = load(pair.small, trust)
    weights = [m.dense_weight() for m in model.modules() if is_compressed(m)]
    dense = model.dequantize()
    assert not any(is_compressed(module) for module in dense.modules())
    assert torch.allclose(logits_of(dense), want, atol=1e-4)
    by_name = [
        m.weight.T if type(m).__name__ == "Conv1D" else m.weight
        for m in (dense.get_submodule(name) for name in _names(pair))
    ]
    assert all(torch.equal(a, b) for a, b in zip(by_name, weights, strict=True))
    if case == "llama":
        with pytest.raises(ModelError, match="got a bias from its method"):
            to_dense(pair.small, tmp_path / "exported")
        return
    dense.save_pretrained(tmp_path / "dense")
    to_dense(pair.small, tmp_path / "exported", max_shard_bytes=6000)
    for folder in (tmp_path / "dense", tmp_path / "exported"):
        assert torch.allclose(logits_of(load(folder)), want, atol=1e-4)


def _names(pair: Pair) -> list[str]:
    modules: Any = pair.reference.named_modules()
    return [name for name, module in modules if is_compressed(module)]


@both_ways
def test_it_generates_compiles_and_trains(trust: bool, llama: Pair) -> None:
    model = load(llama.small, trust)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(BATCH, **options), llama.reference.generate(BATCH, **options))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(BATCH, use_cache=False).logits, logits_of(model), atol=1e-4)
    model.train()
    model(BATCH, labels=BATCH).loss.backward()
    layer = model.get_submodule(ALL)
    for part in ("weight", "rest_in", "columns", "sparse_values"):
        assert getattr(layer, part).grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("layers", "version"),
    [
        (None, 1),
        (varied_layers, 2),
        (sparse_layers, 3),
        (eight_bit_layers, 3),
        (summed_layers, 4),
    ],
)
def test_a_folder_has_the_least_version_that_has_its_parts(
    layers: Any, version: int, tmp_path: Path
) -> None:
    small = make_pair(tiny_model("llama"), tmp_path, layers=layers).small
    settings = json.loads((small / "config.json").read_text())["quantization_config"]
    assert settings["format_version"] == version


@pytest.mark.parametrize(
    ("entry", "version"),
    [
        ({"rank": 3}, 1),
        ({"rank": 3, "factor_in": "x"}, 2),
        ({"rank": 3, "columns": 1}, 2),
        ({"rank": 0}, 3),  # which code of formats 1 and 2 refuses
        ({"rank": 0, "columns": 1}, 3),
        ({"rank": 3, "bias": True}, 3),
        ({"rank": 3, "factor_in": "x", "bias": True}, 3),
        ({"rank": 3, "nonzeros": 9}, 3),
        ({"rank": 3, "bits": 8}, 3),
        ({"rank": 3, "columns": 1, "nonzeros": 9}, 4),
        ({"rank": 3, "bits": 8, "columns": 1}, 4),
        ({"rank": 3, "bits": 8, "nonzeros": 9}, 4),
        ({"rank": 3, "pivot": True}, 4),
    ],
)
def test_the_version_of_an_entry(entry: dict[str, Any], version: int) -> None:
    assert version_of([entry]) == version == version_of([{"rank": 3}, entry])
    assert version_of([]) == 1
