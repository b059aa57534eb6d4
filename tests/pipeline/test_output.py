"""Where the model folder goes: it loads, repeats its own run, and replaces nothing but itself."""

import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_core.errors import ConfigError
from flows.settings.config import RunConfig, build_config
from storage.copying import copy
from storage.errors import StorageError
from storage.gc import collect_garbage
from storage.store import Store
from tasks.stages.materialise import publishing
from tests.pipeline import pico
from tests.pipeline.conftest import Run
from tests.pipeline.forking import run_script

LOAD = """
import sys
sys.modules.update(dict.fromkeys(["compress_core", "flows", "tasks", "storage"]))
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("Some text.", return_tensors="pt")
print(model(input_ids=tokens["input_ids"]).logits.double().sum().item())
"""


@pytest.fixture
def staying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for folders that the registry of the shared home names, for as long as that lasts."""
    return tmp_path_factory.mktemp("outputs")


def test_output_and_the_configuration_in_it(
    run: Run,
    cold: dict[str, Any],
    cold_home: Path,
    inputs: pico.Inputs,
    staying: Path,
    tmp_path: Path,
) -> None:
    target = staying / "deep" / "out"
    first = run(inputs.settings(cold_home, output=target))
    assert first["model_dir"] == str(target)
    config = build_config(RunConfig, {}, target / "eigenpress.yaml")
    assert config.output == target
    assert config.model == str(inputs.model)
    again = run(config.model_dump())  # replaces the folder of the run before
    assert pico.counts(again["stages"], "computed") == {"register": 1}
    assert pico.tree(target).keys() == pico.tree(Path(cold["model_dir"])).keys()
    assert os.listdir(target.parent) == ["out"]
    printed = run_script(LOAD, target, folder=tmp_path)
    assert torch.isfinite(torch.tensor(float(printed)))


@pytest.mark.parametrize("case", ["model", "above the model", "documents", "file", "config", "own"])
def test_an_output_that_is_not_ours_is_refused_before_any_stage(
    case: str, inputs: pico.Inputs, tmp_path: Path
) -> None:
    mine = pico.copy_inputs(inputs, tmp_path / "mine")
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.tex").write_text("years of work")
    target = {
        "model": mine.model,
        "above the model": tmp_path / "mine",
        "documents": documents,
        "file": documents / "thesis.tex",
        "config": documents,
        "own": mine.model,
    }[case]
    settings = mine.settings(tmp_path / "home", output=target)
    if case in ("config", "own"):  # where the user keeps the settings is not what a run wrote
        text = json.dumps(RunConfig(**settings).model_dump(mode="json"))
        (target / "eigenpress.yaml").write_text(text)
        (documents / "config.json").write_text("{}")
    before = pico.tree(tmp_path)
    with pytest.raises(ConfigError, match="--output") as caught:
        pico.walk(settings)
    assert "\n" not in str(caught.value)
    after = pico.tree(tmp_path)
    assert {path: after[path] for path in before} == before
    assert not list((tmp_path / "home" / "store").glob("*/*/*/manifest.json"))


def test_an_output_folder_is_checked_again_before_it_is_replaced(
    run: Run, cold_home: Path, inputs: pico.Inputs, staying: Path
) -> None:
    target = staying / "out"
    run(inputs.settings(cold_home, output=target))
    (target / "adapter").mkdir()
    (target / "adapter" / "weights.bin").write_bytes(b"trained since")
    with pytest.raises(ConfigError, match=r"adapter/weights\.bin"):
        run(inputs.settings(cold_home, output=target))
    assert (target / "adapter" / "weights.bin").read_bytes() == b"trained since"


def test_a_folder_published_by_many_at_once_is_always_whole(
    cold_walk: pico.Walk, tmp_path: Path
) -> None:
    artifact = cold_walk.session.artifact(cold_walk.pipeline.folder)
    target = tmp_path / "models" / "one"
    target.parent.mkdir()

    def publish_some(_: int) -> None:
        for _ in range(8):
            with publishing(artifact, target) as staging:
                (staging / "eigenpress.yaml").write_text("a: 1")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(publish_some, range(4)))
    assert os.listdir(target.parent) == ["one"]
    assert pico.tree(target) == pico.tree(artifact.file("model")) | {
        "eigenpress.yaml": hashlib.sha256(b"a: 1").hexdigest()
    }


def test_a_published_folder_is_a_copy_and_a_linked_one_is_read_only(
    cold_walk: pico.Walk, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(cold_walk.session.store.root, store)
    key = cold_walk.session.manifests[cold_walk.pipeline.folder].key
    artifact = Store(store).open(key, "materialise")
    stored = artifact.file("model") / "model.safetensors"
    copied, linked = tmp_path / "copied", tmp_path / "linked"
    with publishing(artifact, copied):
        pass
    assert not os.path.samefile(copied / "model.safetensors", stored)
    assert (copied / "model.safetensors").stat().st_mode & 0o200
    with publishing(artifact, linked, link=True):
        pass
    assert os.path.samefile(linked / "model.safetensors", stored)
    assert stored.stat().st_mode & 0o222 == 0
    assert not os.path.samefile(linked / "config.json", artifact.file("model") / "config.json")
    assert pico.tree(copied) == pico.tree(linked) == pico.tree(artifact.file("model"))
    assert Store(store).find(key) == artifact.manifest
    assert Store(store).check(artifact.manifest) == []
    report = collect_garbage(Store(store), [], dry_run=False)
    assert (
        report.freed_bytes
        <= sum(m.nbytes for m in report.removed) - (linked / "model.safetensors").stat().st_size
    )
    assert pico.tree(linked) == pico.tree(copied)
    again = cold_walk.session.artifact(cold_walk.pipeline.folder)
    with publishing(again, linked):  # read-only files are no obstacle
        pass
    assert (linked / "model.safetensors").stat().st_mode & 0o200


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_a_link_that_cannot_be_is_refused_and_not_replaced_by_a_copy(
    cold_walk: pico.Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    artifact = cold_walk.session.artifact(cold_walk.pipeline.folder)
    with (
        pytest.raises(StorageError, match="leave --link out"),
        publishing(artifact, tmp_path / "out", link=True),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kernel", [None, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, "stops", "lacks it"]
)
@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_a_copy_is_whole_whatever_the_kernel_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: int | str | None, size: int
) -> None:
    data = os.urandom(size)
    (tmp_path / "one").write_bytes(data)
    original, pieces = os.copy_file_range, iter([1000])

    def some(old: int, new: int, count: int, *places: int) -> int:
        if isinstance(kernel, int):
            raise OSError(kernel, os.strerror(kernel))
        return original(old, new, min(count, next(pieces, 0)), *places)

    if kernel == "lacks it":
        monkeypatch.delattr(os, "copy_file_range")
    elif kernel is not None:
        monkeypatch.setattr(os, "copy_file_range", some)
    copy(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == data


@pytest.mark.parametrize("stray", ["note.txt", "adapter_config.json", "deep/x.safetensors"])
def test_only_what_the_manifest_names_is_published(
    cold_walk: pico.Walk, tmp_path: Path, stray: str
) -> None:
    artifact = cold_walk.session.artifact(cold_walk.pipeline.folder)
    inside = artifact.file("model")
    before = pico.tree(inside)
    place = inside / stray
    place.parent.mkdir(exist_ok=True)
    place.write_text("{}")
    try:
        with publishing(artifact, tmp_path / "out"):
            pass
    finally:
        place.unlink()
        if place.parent != inside:
            place.parent.rmdir()
    assert pico.tree(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["a" * 231, "é" * 116])
def test_an_output_with_a_name_too_long_is_refused(
    inputs: pico.Inputs, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="at most 230"):
        pico.build(inputs.settings(tmp_path / "home", output=tmp_path / name))
