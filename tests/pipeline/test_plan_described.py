"""A plan of a model whose weights are not there, made of what its configuration describes."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress_core.errors import ModelError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.described import Described, bind_described
from compress_core.hf.layout import inspect_model
from flows.commands.plan import plan_as_run_or_sweep
from flows.report.console import Reporter
from flows.runs.forecast import Planned, Planner
from flows.runs.opened import open_command
from flows.runs.workspace import open_workspace
from flows.settings.config import RunConfig
from tests.families import FAMILIES, tiny_model
from tests.pipeline import pico

METHODS = (
    "svd_llm",
    "press",
    "saes_svd@fisher",
    "soco",
    "sparsegpt",
    "basis_sharing:group=3",
    "gptq:mixed=true",
)


@pytest.fixture
def bare(inputs: pico.Inputs, tmp_path: Path) -> pico.Inputs:
    """The same model without its weights."""
    copied = pico.copy_inputs(inputs, tmp_path / "bare")
    (copied.model / "model.safetensors").unlink()
    return copied


def plan(given: dict[str, Any]) -> Any:
    printed: list[Any] = []
    plan_as_run_or_sweep(given, None, True, printed.append)
    return json.loads(json.dumps(printed[0]))


def shapes(units: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(unit["stage"], unit["unit"], unit["state"], unit["cost"]) for unit in units]


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_plan_of_random_weights_but_for_digests(
    method: str, inputs: pico.Inputs, bare: pico.Inputs, home: Path
) -> None:
    more = {"recover": "blocks+factors", "kept": 0.8} if method == "svd_llm" else {}
    given = {"method": method, **more}
    whole, found = (plan(own.settings(home, **given)) for own in (inputs, bare))
    assert shapes(found["units"]) == shapes(whole["units"])
    for measured in ("free_memory", "free_disk"):  # of this moment
        for own in (whole, found):
            own["estimate"].pop(measured)
    for own in (whole, found):
        own["estimate"]["largest"] = shapes([own["estimate"]["largest"]])
    assert found["estimate"] == whole["estimate"]
    (note,) = (note for note in found["notes"] if "no weights" in note)
    assert f"{bare.model} has no weights: planned" in note and "in float32;" in note
    assert not any("no weights" in note for note in whole["notes"])
    gone = [unit for unit in found["units"] if unit["why"].startswith("not there: ")]
    assert {unit["key"] for unit in gone} == {None}
    assert {"weight", "dense model"} & {unit["why"].split(": ")[1] for unit in gone}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_describes_what_is_saved(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    saved = Checkpoint(tmp_path)
    layout = inspect_model(saved)
    (tmp_path / "model.safetensors").unlink()
    described = Described(tmp_path)
    found = inspect_model(described, binding=bind_described)
    # names in files may be older than the model's own (GPT-NeoX's head)
    assert replace(found, stored=layout.stored) == layout
    assert len(described.names) == len(saved.names)

    def header(checkpoint: Checkpoint, key: str) -> tuple[Any, ...]:
        return checkpoint.shape(key), checkpoint.dtype(key), checkpoint.torch_dtype(key)

    for name, key in layout.stored.items():
        assert header(described, found.stored[name]) == header(saved, key)
    with pytest.raises(ModelError, match="no numbers of"):
        described.read(described.names[0])


def states(inputs: pico.Inputs, home: Path, **more: Any) -> dict[str, set[str]]:
    settings = RunConfig(**inputs.settings(home, **more))
    opened = open_command(settings, Reporter(quiet=True), planning=True)
    planned: list[Planned] = Planner(opened.workspace.store).plan(opened.pipelines[0])
    found: dict[str, set[str]] = {}
    for unit in planned:
        found.setdefault(unit.stage, set()).add(unit.state)
    return found


def test_what_does_not_read_weights_is_looked_up(
    inputs: pico.Inputs, bare: pico.Inputs, warm_home: Path
) -> None:
    found = states(bare, warm_home)
    assert found["tokenise"] == {"cached"}
    for stage in ("collect", "decompose", "realise", "materialise", "evaluate"):
        assert "cached" not in found[stage]


def test_without_a_tokenizer_windows_are_as_asked(bare: pico.Inputs, home: Path) -> None:
    with_tokenizer = plan(bare.settings(home))
    for file in bare.model.glob("*"):
        if file.name != "config.json":
            file.unlink()
    found = plan(bare.settings(home))
    assert shapes(found["units"]) == shapes(with_tokenizer["units"])
    assert found["estimate"]["seconds"] == with_tokenizer["estimate"]["seconds"]
    assert any("has no weights and no tokenizer: planned" in note for note in found["notes"])
    texts = [unit for unit in found["units"] if unit["stage"] == "tokenise"]
    assert {(unit["why"], unit["key"]) for unit in texts} == {("not there: tokenizer", None)}


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_the_dtype_is_the_configurations_else_float32(
    dtype: str | None, bare: pico.Inputs, home: Path
) -> None:
    file = bare.model / "config.json"
    config = {n: v for n, v in json.loads(file.read_text()).items() if "dtype" not in n}
    file.write_text(json.dumps(config | ({} if dtype is None else {"dtype": dtype})))
    found = plan(bare.settings(home, kept=0.9))
    (note,) = (note for note in found["notes"] if "no weights" in note)
    assert ("in bfloat16;" if dtype else "in float32, as it names no dtype;") in note
    half = plan(bare.settings(home, kept=0.9, compute="float32"))["estimate"]["models"]
    assert found["estimate"]["models"] == half  # what is stored is not what is computed in


def test_nothing_but_a_plan_takes_it(bare: pico.Inputs, home: Path) -> None:
    sentence = "has a config.json but neither model.safetensors nor model.safetensors.index.json"
    with pytest.raises(ModelError, match=sentence):
        open_command(RunConfig(**bare.settings(home)), Reporter(quiet=True))
    with pytest.raises(ModelError, match=sentence):
        open_workspace(RunConfig(**bare.settings(home)))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model-00001-of-00002.safetensors", "has a config.json but neither model.safetensors nor"),
        ("pytorch_model.bin", "has only .bin weights"),
        ("model.safetensors.index.json", "lacks 1 of its 1 weight files, first shard.safetensors"),
    ],
)
def test_a_folder_with_a_part_is_refused(
    name: str, sentence: str, bare: pico.Inputs, home: Path
) -> None:
    text = json.dumps({"weight_map": {"a": "shard.safetensors"}}) if "index" in name else ""
    (bare.model / name).write_text(text)
    with pytest.raises(ModelError, match=sentence):
        plan(bare.settings(home))


def test_a_file_that_the_configuration_names_is_missed(bare: pico.Inputs, home: Path) -> None:
    file = bare.model / "config.json"
    named = {"transformers_weights": "mine.safetensors"}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    with pytest.raises(ModelError, match=r"lacks mine\.safetensors"):
        plan(bare.settings(home))


def test_an_empty_folder_is_no_model(bare: pico.Inputs, home: Path) -> None:
    shutil.rmtree(bare.model)
    bare.model.mkdir()
    with pytest.raises(ModelError, match="is a folder that is no model"):
        plan(bare.settings(home))
