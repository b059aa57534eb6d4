"""Writing a compressed folder: one shard in memory, whole or not there, and clear refusals."""

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress_core.decompose import LowRank
from compress_core.errors import ModelError
from compress_core.folder.export import to_dense
from compress_core.folder.modelling import modelling_source, stock_class
from compress_core.folder.write import CompressedWeights, FolderSummary, write_folder
from compress_core.forms.names import EIGHT_BITS
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.sparse import Sparse
from tests.families import tiny_model
from tests.pipeline.contents import stores
from tests.pipeline.folders import as_layers, edit_config, make_pair, random_factors, write_small

K_PROJ = "model.layers.0.self_attn.k_proj"  # (16, 32) in the tiny Llama
Q_PROJ = "model.layers.0.self_attn.q_proj"  # (32, 32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense folder of a tiny Llama."""
    folder = tmp_path_factory.mktemp("llama") / "dense"
    tiny_model("llama").save_pretrained(folder)
    return folder


def write(target: Path, dense: Path, layers: object, **changes: str) -> FolderSummary:
    checkpoint = Checkpoint(dense)
    layout = replace(inspect_model(checkpoint), **changes)  # type: ignore[arg-type]
    return write_folder(target, checkpoint, layers, layout)  # type: ignore[arg-type]


def k_proj(
    rank: int, rows: int = 16, inputs: int = 32, name: str = K_PROJ, **more: Any
) -> CompressedWeights:
    return stores(name, LowRank(torch.zeros(rows, rank), torch.zeros(rank, inputs), **more))


def q_proj(rank: int, block: int = 0, **more: Any) -> CompressedWeights:
    return k_proj(rank, rows=32, name=f"model.layers.{block}.self_attn.q_proj", **more)


def keeping(
    index: list[int], rank: int = 4, columns: int | None = None, **more: Any
) -> CompressedWeights:
    """k_proj with kept columns."""
    count = len(index) if columns is None else columns
    kept: dict[str, Any] = {"columns": torch.zeros(16, count), "index": torch.tensor(index)}
    return k_proj(rank, inputs=32 - count, **kept, **more)


def some_entries(count: int, rows: int = 16) -> Sparse:
    """That many entries of zero, of an (rows, 32) weight."""
    return Sparse((torch.arange(rows * 32) < count).view(rows, 32), torch.zeros(count))


def sparse_k_proj(count: int, rank: int = 0, **more: Any) -> CompressedWeights:
    return k_proj(rank, sparse=some_entries(count), **more)


def sharing(owner: str, rank: int = 4, **more: Any) -> CompressedWeights:
    """The second block's q_proj with another's in-factor."""
    layer = q_proj(rank, block=1, **more)
    return without_part(replace(layer, entry={**layer.entry, "factor_in": owner}), "factor_in")


def without_part(layer: CompressedWeights, part: str) -> CompressedWeights:
    return replace(layer, tensors={name: t for name, t in layer.tensors.items() if name != part})


def coded(rank: int, rows: int = 16, name: str = K_PROJ, **more: Any) -> CompressedWeights:
    """The first block's k_proj with its factors in 8 bits."""
    low = LowRank(torch.ones(rows, rank), torch.ones(rank, 32), **more)
    return stores(name, low, form=EIGHT_BITS)


def sharing_codes() -> CompressedWeights:
    layer = coded(4, rows=32, name="model.layers.1.self_attn.q_proj")
    return replace(layer, entry={**layer.entry, "factor_in": Q_PROJ})


def sharing_and_keeping() -> CompressedWeights:
    layer = q_proj(4, block=1, columns=torch.zeros(32, 1), index=torch.tensor([3]))
    shared = replace(layer, entry={**layer.entry, "factor_in": Q_PROJ})
    return without_part(shared, "factor_in")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([sparse_k_proj(320, rank=4)], "rank 4 and 320 entries: .*would not be smaller"),
        ([sparse_k_proj(512)], "would not be smaller"),
        ([sparse_k_proj(304, rank=4, bias=torch.zeros(16))], "would not be smaller"),
        ([k_proj(4, sparse=some_entries(8, rows=15))], "are not those of"),
        ([k_proj(4, sparse=Sparse(torch.eye(16, 32) > 0, torch.ones(15)))], "16 entries for 15"),
        ([k_proj(4, bias=torch.zeros(32))], r"a bias of \(32,\) does not fit"),
        ([q_proj(4), sharing(Q_PROJ, sparse=some_entries(8, rows=32))], "shares none"),
        ([k_proj(11)], "would not be smaller"),  # 11 * 48 > 16 * 32
        ([coded(16)], "rank 16: .*would not be smaller"),  # 16 * 33 > 16 * 32
        ([replace(coded(4), entry={"rank": 5, "bits": 8})], "are not those of"),
        ([replace(coded(4), entry={"rank": 4, "bits": 4})], "are not those of"),
        ([replace(k_proj(4), entry={"rank": 4, "twice": True})], "knows no twice=True"),
        ([q_proj(4), sharing_codes()], r"more than factors \(bits\) shares none"),
        ([k_proj(4, rows=32)], "are not those of"),
        ([k_proj(4, name="model.layers.9.self_attn.k_proj")], "has no layer model.layers.9"),
        ([k_proj(4), k_proj(4)], "given twice"),
        ([without_part(k_proj(4), "factor_in")], "are not those of"),
        ([without_part(keeping([1]), "column_index")], "are not those of"),
        ([replace(keeping([1]), entry={"rank": 4})], "are not those of"),
        ([k_proj(4, inputs=31, columns=torch.zeros(8, 1), index=torch.tensor([1]))], "not those"),
        ([keeping([1, 2], columns=1)], "are not those of"),
        ([keeping([2, 1])], f"{K_PROJ} .*column_index is no ascending list"),
        ([keeping([1, 32])], "no ascending list"),
        ([keeping([1, 2, 3], rank=11)], "rank 11 and 3 columns.* would not be smaller"),
        ([keeping([1, 2], rank=4, sparse=some_entries(298))], "2 columns and 298 entries: "),
        ([sharing(Q_PROJ)], f"in-factor of '{Q_PROJ}': that layer is not in the list"),
        ([q_proj(4), sharing(Q_PROJ, rank=5)], r"that one is \(4, 32\), not \(5, 32\)"),
        ([q_proj(4), sharing("model.layers.1.self_attn.q_proj")], "has none of its own"),
        ([keeping([1]), sharing(K_PROJ)], r"more than factors \(columns\) shares none"),
        ([q_proj(4), sharing_and_keeping()], r"more than factors \(columns\) shares none"),
        ([q_proj(22), sharing(Q_PROJ, rank=22)], "would not be smaller"),  # 22 * 96 > 2 * 32 * 32
    ],
)
def test_factors_that_do_not_fit_are_refused(
    layers: list[CompressedWeights], message: str, dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        write(tmp_path / "small", dense, layers)
    assert list(tmp_path.iterdir()) == []


def test_entries_pay_by_their_numbers_and_not_by_their_bytes(dense: Path, tmp_path: Path) -> None:
    """4 * 48 + 303 + 16 is one less than 16 * 32; with the places they take more bytes than it."""
    layer = sparse_k_proj(303, rank=4, bias=torch.zeros(16))
    summary = write(tmp_path / "small", dense, [layer])
    plain = write(tmp_path / "plain", dense, [])
    assert summary.parameters == plain.parameters - 1
    assert summary.nbytes == plain.nbytes - 4 + 64


def test_largest_rank_that_pays_is_taken(dense: Path, tmp_path: Path) -> None:
    write(tmp_path / "small", dense, [k_proj(10)])
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "small")).__name__ == (
        "LlamaForCausalLM"
    )


def test_a_group_that_pays_need_not_pay_layer_by_layer(dense: Path, tmp_path: Path) -> None:
    """At (32, 32) one layer pays below rank 16, two that share below 22; any order will do."""
    u, v = torch.randn(2, 32, 21), torch.randn(21, 32)
    other = "model.layers.1.self_attn.q_proj"
    layers = [stores(other, LowRank(u[1], v), shared_with=Q_PROJ), stores(Q_PROJ, LowRank(u[0], v))]
    summary = write(tmp_path / "small", dense, layers)
    assert summary.layers == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    for block in (0, 1):
        layer: Any = model.get_submodule(f"model.layers.{block}.self_attn.q_proj")
        assert torch.equal(layer.weight, u[block]) and torch.equal(layer.factor_in, v)


@pytest.mark.parametrize("change", [{"architecture": "MineForCausalLM"}, {"base_class": "Mine"}])
def test_models_with_code_of_their_own_are_refused(
    change: dict[str, str], dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="code of their own are not supported"):
        write(tmp_path / "small", dense, [], **change)


def test_a_folder_in_use_is_left_alone(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ModelError, match="not empty"):
        write(tmp_path, dense, [])
    with pytest.raises(ModelError, match="not empty"):
        to_dense(make_pair(tiny_model("llama"), tmp_path / "pair").small, tmp_path)
    assert (tmp_path / "note").read_text() == "mine"


def test_what_fails_half_way_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    def broken() -> Iterator[CompressedWeights]:
        yield k_proj(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "small", dense, broken())
    assert list(tmp_path.iterdir()) == []


def test_layers_are_taken_one_at_a_time(dense: Path, tmp_path: Path) -> None:
    model, alive, most = tiny_model("llama"), weakref.WeakSet[torch.Tensor](), 0
    checkpoint = Checkpoint(dense)

    def watched() -> Iterator[CompressedWeights]:
        nonlocal most
        for layer in as_layers(random_factors(model)):
            tensors = {name: tensor.clone() for name, tensor in layer.tensors.items()}
            alive.update(tensors.values())
            most = max(most, len(alive))
            yield replace(layer, tensors=tensors)

    layout = inspect_model(checkpoint)
    write_folder(tmp_path / "small", checkpoint, watched(), layout, max_shard_bytes=3000)
    # One layer in hand and one shard's worth; all fourteen would be 28 tensors.
    assert most <= 8


def test_views_of_a_large_tensor_are_stored_alone(dense: Path, tmp_path: Path) -> None:
    basis = torch.randn(16, 16)
    u, v = basis[:, :4], torch.randn(32, 4).T
    write(tmp_path / "small", dense, [stores(K_PROJ, LowRank(u, v))])
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert torch.equal(tensors[f"{K_PROJ}.weight"], u)
    assert torch.equal(tensors[f"{K_PROJ}.factor_in"], v)


def test_no_compressed_layer_gives_a_plain_dense_folder(dense: Path, tmp_path: Path) -> None:
    summary = write(tmp_path / "same", dense, [])
    assert summary.layers == 0
    assert not (tmp_path / "same" / "modeling_eigenpress.py").exists()
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == json.loads(
        (dense / "config.json").read_text()
    )
    same, was = (load_file(f / "model.safetensors") for f in (tmp_path / "same", dense))
    assert same.keys() == was.keys() and all(torch.equal(same[key], was[key]) for key in was)


def test_factors_take_the_dtype_of_the_weight_they_replace(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    factors = {name: (u.float(), v.float()) for name, (u, v) in random_factors(model).items()}
    write_small(tmp_path / "dense", tmp_path / "small", factors)
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_companions_are_copied_and_nothing_else(shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "stories260K"
    write(tmp_path / "small", source, [])
    assert sorted(file.name for file in (tmp_path / "small").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    text = "Once upon a time"
    ids = [AutoTokenizer.from_pretrained(f)(text).input_ids for f in (source, tmp_path / "small")]
    assert ids[0] == ids[1]


def test_export_of_a_dense_folder_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model that eigenpress compressed"):
        to_dense(dense, tmp_path / "out")


def test_export_of_a_damaged_config_is_refused(tmp_path: Path) -> None:
    small = make_pair(tiny_model("llama"), tmp_path).small
    edit_config(small, auto_map=None)
    with pytest.raises(ModelError, match="auto_map"):
        to_dense(small, tmp_path / "out")


def test_nothing_but_a_class_of_transformers_gets_into_a_python_file() -> None:
    for name in ("LlamaModel): pass\nimport os\nclass X(LlamaModel", "os", "NoSuchModel"):
        with pytest.raises(ModelError, match="has no class"):
            modelling_source("LlamaForCausalLM", name, "model")
        with pytest.raises(ModelError, match="has no class"):
            stock_class({"AutoModel": f"modeling.{name}"}, "AutoModel")
