"""What the store promises about damage on disk: found, reported, put aside, alone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from storage.artifact import Artifact
from storage.errors import ArtifactCorruptError, ArtifactMissingError
from storage.gc import collect_garbage
from storage.keys import recipe_key
from storage.manifest import Manifest
from storage.store import Store
from tasks.stages import scratch
from tests.contracts.stores import drafts, folder, make


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGED = [
    ("arrays/u/c.1.0", "checksum is wrong"),
    ("arrays/u/zarr.json", "checksum is wrong"),
    ("files/note.txt", "checksum is wrong"),
    ("manifest.json", "checksum is wrong|not JSON"),
]


@pytest.mark.parametrize("verified_before", [False, True])
@pytest.mark.parametrize(("name", "flipped"), DAMAGED)
@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_damage_is_found_reported_and_put_aside_alone(
    store: Store, problems: list[str], name: str, flipped: str, harm, verified_before: bool
) -> None:
    harmed, sound = make(store, 0), make(store, 1)
    if verified_before:
        assert store.find(harmed.key) == harmed
    harm(folder(store, harmed) / name)
    wrong = {flip: flipped, cut: "bytes instead of|checksum|JSON", Path.unlink: "is missing"}[harm]
    checked = store.check(harmed)
    assert len(checked) == 1
    assert store.find(sound.key) == sound
    assert problems == []
    assert store.find(harmed.key) is None
    (line,) = problems
    assert line.startswith("weigh ")
    assert harmed.key[:12] in line
    assert Path(name).name in line
    assert "\n" not in line
    assert any(part in line for part in wrong.split("|"))
    assert line.endswith("will be computed again")
    assert not folder(store, harmed).exists()
    assert drafts(store) == []
    assert make(store, 0).digest == harmed.digest
    assert store.find(harmed.key) is not None


def test_peek_sees_missing_files_and_touches_nothing(store: Store, problems: list[str]) -> None:
    made = make(store)
    (folder(store, made) / "files/note.txt").unlink()
    assert store.peek(made.key) is None
    assert problems == []
    assert folder(store, made).is_dir()


def test_a_verified_artifact_is_not_read_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(store)
    assert store.find(made.key) == made

    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr("storage.verify.checksum", refuse)
    assert Store(store.root).find(made.key, "weigh") == made
    shutil.rmtree(folder(store, made))
    assert store.find(made.key) is None


def test_damage_after_the_check_is_still_caught_by_the_read(store: Store) -> None:
    made = make(store)
    artifact = store.open(made.key)
    flip(folder(store, made) / "arrays/u/c.0.0")
    with pytest.raises(ArtifactCorruptError, match="damaged chunk"):
        artifact.array("u")
    (folder(store, made) / "files/note.txt").unlink()
    with pytest.raises(ArtifactCorruptError, match=r"lacks its file 'note\.txt'"):
        artifact.file("note.txt")


def test_a_commit_replaces_a_winner_whose_manifest_is_damaged(store: Store) -> None:
    made = make(store)
    flip(folder(store, made) / "manifest.json")
    assert store.find(make(store).key) is not None


def test_a_folder_without_manifest_is_garbage_and_is_left_out(
    store: Store, problems: list[str]
) -> None:
    made = make(store)
    (folder(store, made) / "manifest.json").unlink()
    assert list(store.manifests()) == []
    assert len(problems) == 1
    with pytest.raises(ArtifactMissingError, match="no manifest"):
        store.open(made.key)
    assert collect_garbage(store, [], dry_run=False).orphans == [folder(store, made)]


def stray_file(path: Path) -> None:
    path.write_text("{}")


def stray_link(path: Path) -> None:
    path.symlink_to(Path(__file__))


@pytest.mark.parametrize("place", ["x", "arrays/x", "arrays/u/c.9.0", "files/x", "files/model/x"])
@pytest.mark.parametrize("put", [stray_file, stray_link, Path.mkdir])
def test_what_should_not_be_there_is_said_and_read_by_nobody(
    store: Store, problems: list[str], place: str, put: Callable[[Path], None]
) -> None:
    made = make_folder_artifact(store)
    assert store.check(made) == []
    put(folder(store, made) / place)
    assert store.check(made) == [f"{place} is not in its manifest"]
    assert store.find(made.key) == made  # nothing of its own is damaged
    assert problems == []
    artifact = store.open(made.key)
    assert artifact.array("u").shape == (600, 4)
    assert artifact.file("note.txt").read_text() == "note"
    assert {str(name) for name in artifact.files("model")} == {"config.json", "deep/weights"}
    if place == "files/model/x":  # who loads the folder would load the stray
        with pytest.raises(ArtifactCorruptError, match=r"files/model/x is not part of it.*remove"):
            artifact.file("model")
    else:
        assert artifact.file("model").is_dir()


def test_a_link_in_the_place_of_a_file_is_damage(store: Store, problems: list[str]) -> None:
    made = make(store)
    file = folder(store, made) / "files/note.txt"
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))  # the same bytes, for now
    assert store.check(made) == [
        "files/note.txt is no plain file",
        "files/elsewhere is not in its manifest",
    ]
    assert store.find(made.key) is None
    assert "is no plain file" in problems[0]


def make_folder_artifact(store: Store) -> Manifest:
    recipe = {"a": "folder"}
    with store.draft(
        key=recipe_key(recipe), stage="weigh", unit="model", recipe=recipe, inputs={}
    ) as draft:
        draft.put("u", np.ones((600, 4)))
        draft.add_file("note.txt").write_text("note")
        model = draft.add_file("model")
        (model / "deep").mkdir(parents=True)
        (model / "config.json").write_text("{}")
        (model / "deep" / "weights").write_text("1")
    return draft.manifest


READS: list[Callable[[Artifact], object]] = [
    lambda artifact: artifact.array("u"),
    lambda artifact: artifact.array("u", rows=3),
    lambda artifact: artifact.file("note.txt"),
    lambda artifact: artifact.file("model"),
]


@pytest.mark.parametrize("again", [False, True], ids=["removed", "replaced"])
@pytest.mark.parametrize("read", READS)
def test_what_is_removed_while_it_is_open_is_missing_and_not_damaged(
    store: Store, problems: list[str], read: Callable[[Artifact], object], again: bool
) -> None:
    made = make_folder_artifact(store)
    artifact = store.open(made.key)
    where = folder(store, made)
    for part in ("arrays", "files"):  # as the other process's deletion has come to it
        shutil.rmtree(where / part)
    store.remove(made.key)
    if again:
        shutil.rmtree(folder(store, make_folder_artifact(store)) / "arrays")
        shutil.rmtree(where / "files")
    with pytest.raises(ArtifactMissingError, match="was removed while it was being read"):
        read(artifact)
    assert problems == []


@pytest.mark.parametrize("whole", [False, True], ids=["a chunk", "the artifact"])
def test_a_chunk_that_goes_while_it_is_read_is_never_read_as_zeros(
    store: Store, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    made = make(store)
    artifact, chunk = store.open(made.key), folder(store, made) / "arrays/u/c.1.0"
    opened = zarr.open_array

    def late(*given: Any, **more: Any) -> Any:
        array = opened(*given, **more)
        monkeypatch.setattr(type(array), "__getitem__", read_after_removal)
        return array

    original = zarr.Array.__getitem__

    def read_after_removal(array: zarr.Array, rows: Any) -> Any:
        if whole:
            store.remove(made.key)
        elif chunk.exists():
            chunk.unlink()
        return original(array, rows)

    monkeypatch.setattr("storage.arrays.zarr.open_array", late)
    kind = ArtifactMissingError if whole else ArtifactCorruptError
    with pytest.raises(kind, match="removed while" if whole else r"lacks its chunk c\.1\.0"):
        artifact.array("u")


MOMENTS = [
    "storage.store.read_manifest",
    "storage.verify.shallow_problems",
    "storage.verify.checksum",
    "storage.verify.signature",
]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("look", ["find", "peek", "check", "manifests", "load", "gc"])
def test_what_is_removed_while_it_is_looked_at_is_no_problem(
    store: Store,
    problems: list[str],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    look: str,
) -> None:
    made = make(store, 0)
    module, _, name = moment.rpartition(".")
    original = getattr(sys.modules[module], name)

    def removed_first(*given: Any) -> Any:
        if folder(store, made).is_dir():
            os.rename(folder(store, made), store.layout.tmp / f"{made.key}-0-0")
        return original(*given)

    monkeypatch.setattr(moment, removed_first)
    looks: dict[str, Callable[[], object]] = {
        "find": lambda: store.find(made.key),
        "peek": lambda: (store.peek(made.key), None)[1],
        "check": lambda: store.check(made) or None,
        "manifests": lambda: (list(store.manifests()), None)[1],
        "load": lambda: scratch.load(store, {"seed": 0}, "u"),
        "gc": lambda: (collect_garbage(store, [], dry_run=True), None)[1],
    }
    assert looks[look]() is None
    assert problems == []


def test_scratch_that_another_process_discards_is_missing(store: Store) -> None:
    recipe, states = {"block": 1}, {"hidden": torch.ones(600, 3)}
    scratch.keep(store, recipe, "block 1", states)
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(store.root)])
    found = 0
    while other.poll() is None:
        scratch.keep(store, recipe, "block 1", states)
        loaded = scratch.load(store, recipe, "hidden")
        found += loaded is not None
        assert loaded is None or torch.equal(loaded[0], states["hidden"])
    assert other.returncode == 0
    assert found


OTHER = """
import sys
from pathlib import Path
from storage.errors import ArtifactMissingError
from storage.keys import recipe_key
from storage.store import Store
store, key = Store(Path(sys.argv[1])), recipe_key({"block": 1})
for _ in range(60):
    try:
        store.remove(key)
    except ArtifactMissingError:
        pass
"""
