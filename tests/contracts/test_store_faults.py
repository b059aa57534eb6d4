"""What the store promises when writing goes wrong: a crash, a race, a full disk, no permission."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storage import disk
from storage.errors import (
    ArtifactCorruptError,
    StorageError,
    StoreFullError,
    StorePermissionError,
    StoreVersionError,
)
from storage.gc import collect_garbage
from storage.keys import recipe_key
from storage.manifest import Manifest
from storage.records import write_record
from storage.store import Store
from tests.contracts.stores import drafts, folder, make
from tests.users import without_root

REPOSITORY = Path(__file__).resolve().parents[2]
KEY = recipe_key({"seed": 0})


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_exception_in_a_draft_leaves_nothing(store: Store, error: BaseException) -> None:
    with (
        pytest.raises(type(error)),
        store.draft(key=KEY, stage="weigh", unit="u", recipe={}, inputs={}) as draft,
    ):
        draft.put("u", np.ones(3))
        raise error
    assert store.find(KEY) is None
    assert drafts(store) == []
    with pytest.raises(StorageError, match="not committed"):
        _ = draft.manifest


def test_a_promised_file_that_is_not_written_stops_the_commit(store: Store) -> None:
    with (
        pytest.raises(StorageError, match=r"'model\.bin' was not written"),
        store.draft(key=KEY, stage="weigh", unit="u", recipe={}, inputs={}) as draft,
    ):
        draft.add_file("model.bin")
    assert store.find(KEY) is None


def test_values_that_are_not_json_stop_the_commit_and_are_named(store: Store) -> None:
    with (
        pytest.raises(ValueError, match=r"attrs\.loss is nan"),
        store.draft(key=KEY, stage="weigh", unit="u", recipe={}, inputs={}) as draft,
    ):
        draft.attrs["loss"] = float("nan")
    assert drafts(store) == []


CHILD = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from storage.store import Store

    store = Store(Path(sys.argv[1]))
    with store.draft(key=sys.argv[2], stage="weigh", unit="u", recipe={}, inputs={}) as draft:
        draft.put("u", np.ones((300, 3)))
        print("inside", flush=True)
        sys.stdin.readline()
    print(draft.manifest.created, flush=True)
"""


def start_child(store: Store) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(store.root), KEY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "inside\n"
    return child


def test_kill_9_in_a_draft_leaves_only_an_orphan_that_gc_removes(store: Store) -> None:
    child = start_child(store)
    (orphan,) = drafts(store)
    assert collect_garbage(store, [], dry_run=True).orphans == []  # its process still runs
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert store.find(KEY) is store.peek(KEY) is None
    assert drafts(store) == [orphan]
    report = collect_garbage(store, [], dry_run=False)
    assert report.orphans == [orphan]
    assert report.freed_bytes > 300 * 3 * 8
    assert drafts(store) == []


def test_two_processes_with_the_same_key_both_end_well(store: Store) -> None:
    children = [start_child(store), start_child(store)]
    created = [child.communicate("\n")[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert len(set(created)) == 1  # the loser was given the winner's manifest
    assert store.find(KEY) is not None
    assert drafts(store) == []


def test_an_old_draft_is_an_orphan_even_if_its_process_id_lives(store: Store) -> None:
    old = store.layout.tmp / f"{KEY}-{os.getpid()}-0badcafe"
    old.mkdir()
    assert collect_garbage(store, [], dry_run=True).orphans == []
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    assert collect_garbage(store, [], dry_run=False).orphans == [old]


def test_a_newer_store_or_manifest_is_refused(store: Store) -> None:
    made = make(store)
    path = folder(store, made) / "manifest.json"
    fields = {**json.loads(path.read_text()), "format": 2}
    del fields["checksum"]
    write_record(path, fields)
    with pytest.raises(StoreVersionError, match=r"format 2, .* reads up to 1: upgrade"):
        store.find(made.key)
    write_record(store.root / "FORMAT.json", {"format": 3})
    with pytest.raises(StoreVersionError, match=r"format 3, .* reads up to 1: upgrade"):
        Store(store.root)
    (store.root / "FORMAT.json").write_text("oops")
    with pytest.raises(StorageError, match=r"FORMAT\.json is damaged"):
        Store(store.root)


def flips(path: Path) -> Iterator[bytes]:
    """The file's bytes with one bit of them flipped, wherever it is."""
    data = path.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        yield bytes(changed)


@pytest.mark.parametrize("before", [None, b'{"format": 1}'], ids=["ours", "an earlier version's"])
def test_no_flipped_bit_of_the_marker_passes_for_a_newer_version(
    store: Store, before: bytes | None
) -> None:
    marker = store.root / "FORMAT.json"
    if before is not None:
        marker.write_bytes(before)
        Store(store.root)
    for damaged in flips(marker):
        marker.write_bytes(damaged)
        with pytest.raises(
            StorageError, match=r"FORMAT\.json is damaged.*delete that file"
        ) as caught:
            Store(store.root)
        assert not isinstance(caught.value, StoreVersionError)
    marker.write_bytes(b'{"format": 3}')  # nor does a format that no checksum vouches for
    with pytest.raises(StorageError, match="is damaged"):
        Store(store.root)
    marker.unlink()
    assert Store(store.root).root == store.root


def test_no_flipped_bit_of_a_manifest_passes_for_a_newer_version(
    store: Store, problems: list[str]
) -> None:
    path = folder(store, make(store)) / "manifest.json"
    whole = path.read_bytes()
    for damaged in flips(path):
        with pytest.raises(ArtifactCorruptError):
            Manifest.from_json(damaged, "it")
    path.write_bytes(whole.replace(b'"format":1', b'"format":3'))
    assert store.find(KEY) is None
    assert "checksum is wrong" in problems[0]
    assert make(store).key == KEY


def test_a_file_in_the_place_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StorageError, match="is a file where a folder belongs"):
            Store(root)


@pytest.fixture
def nobody() -> Iterator[None]:
    with without_root():
        yield


@pytest.mark.parametrize("exists", [False, True])
def test_a_home_without_write_permission_is_refused(
    tmp_path: Path, exists: bool, request: pytest.FixtureRequest
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if exists:
        Store(home / "store")
        (home / "store").chmod(0o555)
    home.chmod(0o555)
    request.getfixturevalue("nobody")
    with pytest.raises(StorePermissionError, match=r"cannot write .*--home") as caught:
        Store(home / "store")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_refused_write_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorePermissionError, match=r"cannot write .*--home") as caught:
        Store(tmp_path / "store")
    assert "\n" not in str(caught.value)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "place", ["storage.draft.write_array", "os.fsync", "os.rename", "storage.draft.add_to_index"]
)
def test_a_full_disk_loses_only_the_draft(
    store: Store, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    before = make(store, 1)
    with monkeypatch.context() as patched:
        patched.setattr(place, full)
        with pytest.raises(
            StoreFullError, match=r"disk full while writing weigh layer 3"
        ) as caught:
            make(store, 0)
    needed = int(str(caught.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert needed >= 600 * 4 * 8
    assert "run the same command again" in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert drafts(store) == []
    assert store.find(KEY) is None
    assert store.find(before.key) == before
    assert make(store, 0).key == KEY


def test_a_full_disk_told_in_words_by_a_native_writer_counts_too(store: Store) -> None:
    with (
        pytest.raises(StoreFullError),
        store.draft(key=KEY, stage="materialise", unit="m", recipe={}, inputs={}),
    ):
        raise RuntimeError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )
    assert not disk.is_disk_full(RuntimeError("something else"))
