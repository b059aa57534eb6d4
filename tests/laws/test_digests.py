"""Laws of digests of outside files: they name the bytes, and a remembered one is never stale."""

import io
import json
import mmap
import os
import shutil
import struct
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from storage import digests, stamps
from storage.digests import DigestCache, file_digest, safetensors_digests
from storage.errors import StorageError
from storage.stamps import tells_changes


@pytest.fixture
def old_file(on_disk: Path) -> Path:
    path = on_disk / "text.txt"
    path.write_text("hello")
    set_age(path, 60)
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change times cannot be set back: a fresh file counts as old here, on any file system."""
    monkeypatch.setattr(digests, "RACY_NS", -60_000_000_000)
    monkeypatch.setattr(digests, "tells_changes", lambda path: True)


def set_age(path: Path, seconds: float) -> None:
    then = time.time_ns() - int(seconds * 1e9)
    os.utime(path, ns=(then, then))


class Counter:
    """A digest function that counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, path: Path) -> dict[str, str]:
        self.calls += 1
        return {"file": file_digest(path)}


def test_a_file_digest_names_the_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, data in zip(
        paths, [b"x" * 3_000_000, b"x" * 3_000_000, b"x" * 2_999_999 + b"y"], strict=True
    ):
        path.write_bytes(data)
    one, same, other = (file_digest(path) for path in paths)
    assert one == same != other
    assert one.startswith("xxh3:")
    assert len(one) == 5 + 32


@pytest.mark.usefixtures("settled")
def test_a_digest_is_remembered_in_this_and_in_the_next_process(
    tmp_path: Path, old_file: Path
) -> None:
    count = Counter()
    cache = DigestCache(tmp_path / "home" / "digests.json")
    first = cache.of(old_file, "text", count)
    assert cache.of(old_file, "text", count) == first
    assert DigestCache(tmp_path / "home" / "digests.json").of(old_file, "text", count) == first
    assert count.calls == 1
    cache.of(old_file, "other kind", count)
    assert count.calls == 2


@pytest.mark.usefixtures("settled")
def test_a_link_is_remembered_as_the_file_it_leads_to(tmp_path: Path, old_file: Path) -> None:
    count = Counter()
    cache = DigestCache(tmp_path / "digests.json")
    (tmp_path / "link").symlink_to(old_file)
    assert cache.of(tmp_path / "link", "text", count) == cache.of(old_file, "text", count)
    assert count.calls == 1


def in_place(path: Path, times: os.stat_result) -> None:
    with path.open("r+") as file:
        file.write("HELLO")


def by_another_name(path: Path, times: os.stat_result) -> None:
    os.link(path, path.with_name("link"))
    in_place(path.with_name("link"), times)


def renamed(path: Path, times: os.stat_result) -> None:
    fresh = path.with_name("fresh")
    fresh.write_text("HELLO")
    os.utime(fresh, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(fresh, path)


def unpacked(path: Path, times: os.stat_result) -> None:
    """As reproducible builds and image layers are: one time for all files, over the old one."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        entry = tarfile.TarInfo(path.name)
        entry.size, entry.mtime = 5, int(times.st_mtime)
        archive.addfile(entry, io.BytesIO(b"HELLO"))
    data.seek(0)
    with tarfile.open(fileobj=data) as archive:
        archive.extractall(path.parent, filter="data")


def copied(path: Path, times: os.stat_result) -> None:
    """As `cp --preserve`, `rsync -t --inplace` do."""
    other = path.with_name("other")
    other.write_text("HELLO")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    shutil.copy2(other, path)


def mapped(path: Path, times: os.stat_result) -> None:
    """Written before as well, so that the page is in memory and changed already."""
    MAPS[path][:5] = b"HELLO"


MAPS: dict[Path, mmap.mmap] = {}
CHANGES = [in_place, by_another_name, renamed, unpacked, copied, mapped]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["text", "file", "safetensors"])
def test_a_changed_file_is_digested_again_whatever_its_times_and_size_say(
    tmp_path: Path, old_file: Path, change: Callable[[Path, os.stat_result], None], kind: str
) -> None:
    if change is mapped and not tells_changes(old_file):
        pytest.skip("this file system does not move the times of files that are mapped")
    with old_file.open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        MAPS[old_file] = pages
        if change is mapped:
            pages[:5] = b"hello"
        times = old_file.stat()
        count = Counter()
        cache = DigestCache(tmp_path / "home" / "digests.json")
        first = cache.of(old_file, kind, count)
        assert cache.of(old_file, kind, count) == first
        assert count.calls == 1
        time.sleep(0.02)  # the kernel's clock ticks every few milliseconds
        change(old_file, times)
        if change is not mapped:
            os.utime(old_file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert old_file.read_text() == "HELLO"
        for again in (cache, DigestCache(tmp_path / "home" / "digests.json")):
            assert again.of(old_file, kind, count) == {"file": file_digest(old_file)} != first


def test_a_file_written_a_moment_ago_is_not_trusted(tmp_path: Path, old_file: Path) -> None:
    cache = DigestCache(tmp_path / "home" / "digests.json")
    cache.of(old_file, "text", Counter())  # its time says a minute ago, its change time now
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("time.time_ns", lambda: 1_000_000_000_000_000_000),  # the clock was set back
        ("tells_changes", lambda path: False),  # a file system whose times say nothing
        ("_settle", lambda path: False),  # maps of it cannot be written out
    ],
)
@pytest.mark.usefixtures("settled")
def test_what_may_change_without_showing_it_is_not_remembered(
    tmp_path: Path, old_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    monkeypatch.setattr(f"storage.digests.{name}", value)
    count = Counter()
    cache = DigestCache(tmp_path / "home" / "digests.json")
    for _ in range(2):
        cache.of(old_file, "text", count)
    assert count.calls == 2


MOUNTS = rb"""20 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
21 20 0:22 / /dev/shm rw - tmpfs tmpfs rw
22 20 7:0 / /image ro - squashfs /dev/loop0 ro
23 20 8:1 /data /image/data rw - xfs /dev/sdb1 rw
24 20 0:33 / /a\040blank/\303\251 rw - overlay overlay rw
25 20 8:1 /one /srv/model.bin rw - ext4 /dev/sda1 rw
26 20 0:40 / /srv rw - fuse.sshfs host: rw
"""


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/home/model.bin", True),
        ("/dev/shm/model.bin", False),
        ("/dev/shmodel.bin", True),
        ("/image/model.bin", False),
        ("/image/data/model.bin", True),
        ("/a blank/é/model.bin", False),
        ("/srv/model.bin", True),
        ("/srv/other.bin", False),
    ],
)
def test_only_disks_of_this_machine_are_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, told: bool
) -> None:
    (tmp_path / "mountinfo").write_bytes(MOUNTS)
    monkeypatch.setattr(stamps, "MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setattr(stamps.os, "statvfs", lambda path: SimpleNamespace(f_flag=0))
    assert tells_changes(Path(path)) is told
    monkeypatch.setattr(stamps.os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert not tells_changes(Path(path))


@pytest.mark.usefixtures("settled")
def test_stamps_of_earlier_versions_and_flipped_digests_are_not_believed(
    tmp_path: Path, old_file: Path
) -> None:
    path = tmp_path / "digests.json"
    stat = old_file.stat()
    entry = {"stamp": [stat.st_size, stat.st_mtime_ns, stat.st_ino], "value": {"file": "xxh3:0"}}
    entries = {f"text:{old_file.resolve()}": entry}
    path.write_text(json.dumps({"format": 1, "entries": entries}))
    true = {"file": file_digest(old_file)}
    assert DigestCache(path).of(old_file, "text", Counter()) == true
    digest = true["file"][5:]
    path.write_text(path.read_text().replace(digest, digest[::-1]))
    assert DigestCache(path).of(old_file, "text", Counter()) == true


def test_files_that_change_while_they_are_in_use_are_told(tmp_path: Path, old_file: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    other = tmp_path / "other"
    other.write_text("other")
    cache.of(old_file, "file", Counter())
    cache.of(other, "text", Counter())
    cache.check_unchanged()
    os.utime(old_file)  # touched, and the same
    cache.check_unchanged()
    in_place(other, other.stat())
    cache.check_unchanged(but="text")
    with pytest.raises(StorageError, match="other was changed while it was in use"):
        cache.check_unchanged()
    old_file.unlink()
    with pytest.raises(StorageError, match=r"text\.txt was changed while it was in use"):
        cache.check_unchanged(but="text")


def test_a_file_that_changes_under_the_reader_is_refused(tmp_path: Path, old_file: Path) -> None:
    def compute(path: Path) -> dict[str, str]:
        path.write_text("longer than before")
        return {"file": "?"}

    with pytest.raises(StorageError, match="written to while it was being read"):
        DigestCache(tmp_path / "digests.json").of(old_file, "text", compute)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"format": 99}', '{"format": 2, "entries": {"text:x": 3}}', "\x00\xff"],
)
@pytest.mark.usefixtures("settled")
def test_a_damaged_cache_is_an_empty_one(tmp_path: Path, old_file: Path, damage: str) -> None:
    path = tmp_path / "digests.json"
    path.write_text(damage)
    count = Counter()
    for _ in range(2):
        DigestCache(path).of(old_file, "text", count)
    assert count.calls == 1


@pytest.mark.usefixtures("settled")
def test_two_writers_keep_each_others_entries(tmp_path: Path, old_file: Path) -> None:
    path = tmp_path / "digests.json"
    one, other = DigestCache(path), DigestCache(path)
    count = Counter()
    one.of(old_file, "a", count)
    other.of(old_file, "b", count)
    DigestCache(path).of(old_file, "a", count)
    assert count.calls == 2
    assert list(tmp_path.glob(".digests*")) == []


def test_a_tensor_digest_names_dtype_shape_and_bytes(tmp_path: Path) -> None:
    weight = np.arange(12, dtype=np.float32)
    tensors = {"a": weight, "empty": weight[:0], "shaped": weight.reshape(3, 4)}
    save_file({**tensors, "typed": weight.view(np.int32)}, tmp_path / "one.safetensors")
    save_file({"renamed": weight, "more": weight + 1}, tmp_path / "two.safetensors", {"made": "by"})
    one = safetensors_digests(tmp_path / "one.safetensors")
    two = safetensors_digests(tmp_path / "two.safetensors")
    assert two["renamed"] == one["a"]
    assert two.keys() == {"renamed", "more"}
    assert len({*one.values(), *two.values()}) == 5


def test_tensor_digests_of_a_real_checkpoint(shared: Path) -> None:
    path = next(iter(sorted((shared / "models").rglob("*.safetensors"))))
    digests = safetensors_digests(path)
    assert digests
    assert all(digest.startswith("xxh3:") for digest in digests.values())


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(**changes: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 20, "not a safetensors file"),
        (with_header(b"{nope"), "malformed"),
        (with_header([1]), "malformed"),
        (with_header({"w": 3}), "malformed"),
        (with_header(tensor(dtype="F33"), b"x" * 8), "malformed"),
        (with_header(tensor(shape=[3]), b"x" * 8), "malformed.*does not fill"),
        (with_header(tensor(shape=[-2]), b"x" * 8), "malformed"),
        (with_header(tensor(data_offsets=[8, 0]), b"x" * 8), "malformed"),
        (with_header(tensor(), b"x" * 7), "cut short: tensor 'w'"),
    ],
)
def test_what_is_not_whole_safetensors_is_refused_by_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=rf"model\.safetensors.*{message}"):
        safetensors_digests(path)
