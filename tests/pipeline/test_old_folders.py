"""Folders that earlier code wrote still load: formats 1, 2 and 3, by either class.

`old_folders` holds what the code of each format's time wrote of a tiny Llama: its weights, its
config and the logits of a few tokens; beside them the modelling file of each format, word for word.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compress_core.hf  # noqa: F401  registers the format
from compress_core import evaluate
from compress_core.errors import ModelError
from compress_core.folder.export import to_dense
from compress_core.folder.memory import bytes_in_memory, expected_bytes
from compress_core.folder.stream import CompressedStream
from compress_core.forms.linear import is_compressed
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.speed import products_per_token
from compress_core.hf.streamed import Streamed
from compress_core.recover.parts import stored_tensors
from tests import whole
from tests.pipeline.folders import (
    both_ways,
    entries_of,
    expect_same_tensors,
    load,
    run_without_package,
)

OLD = Path(__file__).with_name("old_folders")
FORMATS = {"factors": 1, "columns_and_sharing": 2, "entries_and_biases": 3, "eight_bits": 3}
by_case = pytest.mark.parametrize("case", FORMATS)

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every folder as it was, its modelling file in its place."""
    return {case: _restored(case, tmp_path_factory.mktemp("old") / case) for case in FORMATS}


def _restored(case: str, target: Path) -> Path:
    shutil.copytree(OLD / case, target)
    (target / "logits.safetensors").unlink()
    code = OLD / f"modeling_format_{FORMATS[case]}.txt"
    shutil.copyfile(code, target / "modeling_eigenpress.py")
    return target


def _logits(case: str, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model says of the tokens, and what it said when its folder was written."""
    known = load_file(OLD / case / "logits.safetensors")
    with torch.no_grad():
        return model(known["tokens"]).logits, known["logits"]


def _expect_same(found: torch.Tensor, known: torch.Tensor) -> None:
    """Tensors are the same to the bit; a product of them is only so on processors of one kind."""
    torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)


@by_case
def test_it_runs_block_by_block(case: str, folders: dict[str, Path]) -> None:
    tokens = load_file(OLD / case / "logits.safetensors")["tokens"]
    streamed = Streamed(CompressedStream(folders[case]), tokens, len(tokens))
    found = evaluate.perplexity_and_kl(streamed, tokens)
    assert found == whole.perplexity_and_kl(load(folders[case]), tokens)


@by_case
@both_ways
def test_it_says_what_it_said_and_saves_what_it_had(
    case: str, trust: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = json.loads((folders[case] / "config.json").read_text())["quantization_config"]
    assert settings["format_version"] == FORMATS[case]
    model, found = load(folders[case], trust, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    _expect_same(*_logits(case, model))
    model.save_pretrained(tmp_path / "again")
    assert entries_of(tmp_path / "again") == entries_of(folders[case])
    expect_same_tensors(tmp_path / "again", folders[case])
    for again_trust in (False, True):
        again = load(tmp_path / "again", again_trust)
        _expect_same(*_logits(case, again))


def test_its_own_code_loads_it_where_nothing_of_ours_is(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    damaged = shutil.copytree(folders["factors"], tmp_path / "damaged")
    (damaged / "config.json").write_text(
        (damaged / "config.json").read_text().replace('"format_version": 1', '"format_version": 9')
    )
    run_without_package(
        tmp_path,
        {
            "batch": load_file(OLD / "factors" / "logits.safetensors")["tokens"].tolist(),
            "families": {"llama": str(folders["factors"])}
            | {case: str(folder) for case, folder in folders.items()},
            "resave": {case: str(tmp_path / case) for case in folders},
            "damaged": str(damaged),
            "newer": str(damaged),
        },
    )
    found = load_file(tmp_path / "logits.safetensors")
    for case, folder in folders.items():
        known = load_file(OLD / case / "logits.safetensors")
        _expect_same(found[case], known["logits"])
        expect_same_tensors(tmp_path / case, folder)
        _expect_same(*_logits(case, load(tmp_path / case)))  # what old code saved


@by_case
@both_ways
def test_its_layers_are_known_whichever_class_made_them(
    case: str, trust: bool, folders: dict[str, Path]
) -> None:
    model, stock = load(folders[case], trust), load(folders[case])
    layers = [module for module in model.modules() if is_compressed(module)]
    assert {layer.layer_name for layer in layers} == set(entries_of(folders[case]))
    _logits(case, model)
    assert bytes_in_memory(model) == expected_bytes(Checkpoint(folders[case], compressed=True))
    assert products_per_token(model) == products_per_token(stock)
    names = [stored.name for stored in stored_tensors(model)]
    assert names == [stored.name for stored in stored_tensors(stock)] and len(names) > 14


@by_case
@both_ways
def test_dense_again(case: str, trust: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    dense = load(folders[case], trust).dequantize()
    assert not any(is_compressed(module) for module in dense.modules())
    found, known = _logits(case, dense)
    assert torch.allclose(found, known, atol=1e-5)
    if case == "entries_and_biases":
        with pytest.raises(ModelError, match="got a bias from its method"):
            to_dense(folders[case], tmp_path / "exported")
        return
    dense.save_pretrained(tmp_path / "dense")
    to_dense(folders[case], tmp_path / "exported")
    expect_same_tensors(tmp_path / "dense", tmp_path / "exported")
    assert torch.allclose(*_logits(case, load(tmp_path / "exported")), atol=1e-5)
