"""What the store promises about damage on disk: found, reported, put aside, alone."""

import shutil
from pathlib import Path

import pytest

from storage.errors import ArtifactCorruptError, ArtifactMissingError
from storage.gc import collect_garbage
from storage.store import Store
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
