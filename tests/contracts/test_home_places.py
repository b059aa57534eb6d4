"""A data directory in which something is in the way, full or closed: one good line."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.runs import machine
from flows.runs.machine import Machine, known_machine
from flows.runs.records import save_run_record
from flows.settings.home import FILES, FOLDERS, open_home
from storage import digests
from storage.digests import DigestCache
from storage.errors import StorageError, StoreFullError, StorePermissionError
from storage.layout import INDEX, TMP
from storage.root import FORMAT_NAME
from storage.store import Store
from tests.contracts.conftest import Call
from tests.contracts.stores import folder, make

KNOWN = Machine({"float32": 1.0}, 1.0, 1.0, 1.0, 1.0, "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize("place", [*FILES, *FOLDERS])
@pytest.mark.parametrize(
    "command", ["run --model m --kept 0.5", "demo", "store ls", "store gc", "store verify"]
)
def test_what_is_in_the_way_in_a_home_is_refused_before_any_work(
    refuse: Callable[..., str], tmp_path: Path, command: str, place: str
) -> None:
    home = tmp_path / "home"
    Store(home / "store")
    if place in FILES:
        (home / place).mkdir()
    elif place == "store":
        (home / "store").rename(tmp_path / "away")
        (home / "store").touch()
    else:
        (home / place).touch()
    line = refuse(*command.split(), "--home", home)
    kinds = ("folder", "file") if place in FILES else ("file", "folder")
    assert line.startswith(f"{home / place} is a {kinds[0]} where a {kinds[1]} belongs")


@pytest.mark.parametrize(
    "place", [TMP, INDEX, f"{INDEX}/weigh", "weigh", "weigh/{shelf}", FORMAT_NAME]
)
def test_what_is_in_the_way_in_a_store_is_one_line_that_names_it(
    tmp_path: Path, place: str
) -> None:
    root = tmp_path / "store"
    made = make(Store(root))
    path = root / place.format(shelf=made.key[:2])
    if path.is_file():
        path.unlink()
        path.mkdir()
    else:
        path.rename(tmp_path / "away")
        path.write_text("")
    with pytest.raises(StorageError) as caught:
        make(Store(root))
    assert str(path) in str(caught.value)
    assert any(words in str(caught.value) for words in ("move it away", "delete that file"))


@pytest.mark.parametrize(
    "place", ["", "manifest.json", "arrays", "arrays/u/c.0.0", "files", "files/note.txt"]
)
def test_what_is_in_the_way_in_an_artifact_is_damage(
    store: Store, problems: list[str], place: str
) -> None:
    made = make(store)
    path = folder(store, made) / place
    is_file = path.is_file()
    path.rename(store.root.parent / "away")
    path.mkdir() if is_file else path.write_text("")
    assert list(store.manifests()) == [made] or place in ("", "manifest.json")
    assert store.find(made.key) is None
    assert len(problems) == (0 if place == "" else 2 if place == "manifest.json" else 1)
    assert make(store).digest == made.digest
    assert store.find(made.key) is not None


def write_digests(home: Path) -> None:
    (home / "text").write_text("text")
    DigestCache(home / "digests.json").of(home / "text", "text", lambda file: {"": "xxh3:0"})


WRITERS: dict[str, Callable[[Path], object]] = {
    "digests.json": write_digests,
    "machine.json": lambda home: known_machine(home, "cpu", ["float32"]),
    "runs": lambda home: save_run_record(home, None, {"stages": []}),
    "FORMAT.json": lambda home: Store(home / "store"),
    "index": lambda home: Store(home / "store").rebuild_index(),
    "weigh layer 3": lambda home: make(Store(home / "store")),
}


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StoreFullError),
        (errno.EDQUOT, StoreFullError),
        (errno.EROFS, StorePermissionError),
        (errno.EIO, StorageError),
    ],
)
@pytest.mark.parametrize("call", ["os.fsync", "os.rename", "os.replace", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("what", WRITERS)
def test_a_disk_that_takes_no_more_is_one_line_whatever_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    call: str,
    number: int,
    kind: type[StorageError],
) -> None:
    monkeypatch.setattr(digests, "RACY_NS", -60_000_000_000)
    monkeypatch.setattr(digests, "tells_changes", lambda path: True)
    monkeypatch.setattr(digests, "_settle", lambda path: True)
    monkeypatch.setattr(machine, "measure", lambda *given: KNOWN)
    refused = []

    def refuse(path: object, *given: object, **more: object) -> None:
        refused.append(path)
        name = path if isinstance(path, str | os.PathLike) else None
        raise OSError(number, os.strerror(number), name)

    if what in ("index", "weigh layer 3"):
        Store(tmp_path / "store")
    with monkeypatch.context() as patched:
        patched.setattr(call, refuse)
        try:
            WRITERS[what](tmp_path)
        except kind as error:
            assert "\n" not in str(error)
            assert refused
        else:
            assert not refused, "it went on as if all were written"
    WRITERS[what](tmp_path)  # and all is well once there is room


def test_two_commands_that_begin_at_once_open_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch = Path.touch

    def gone_at_once(path: Path) -> None:
        touch(path)
        path.unlink()

    monkeypatch.setattr(Path, "touch", gone_at_once)
    open_home(tmp_path / "home")


@pytest.mark.parametrize("words", ["/", ".", "..", "nowhere", "model/config.json", "", "a" * 300])
@pytest.mark.parametrize("output", [None, "", "model", "model/deep", "b" * 300, "/proc/x", "note"])
def test_an_export_that_cannot_be_is_one_line(
    call: Call, tmp_path: Path, words: str, output: str | None
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "note").write_text("")
    code, out, err = call("export", words, *([] if output is None else ["--output", output]))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Traceback" not in err
