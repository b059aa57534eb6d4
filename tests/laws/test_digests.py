"""Laws of digests of outside files: they name the bytes, and a remembered one is never stale."""

import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from storage.digests import DigestCache, file_digest, safetensors_digests
from storage.errors import StorageError


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("hello")
    set_age(path, 60)
    return path


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


def test_a_link_is_remembered_as_the_file_it_leads_to(tmp_path: Path, old_file: Path) -> None:
    count = Counter()
    cache = DigestCache(tmp_path / "digests.json")
    (tmp_path / "link").symlink_to(old_file)
    assert cache.of(tmp_path / "link", "text", count) == cache.of(old_file, "text", count)
    assert count.calls == 1


def test_a_changed_file_is_digested_again_even_at_the_same_size_and_time(
    tmp_path: Path, old_file: Path
) -> None:
    count = Counter()
    cache = DigestCache(tmp_path / "digests.json")
    first = cache.of(old_file, "text", count)
    stat = old_file.stat()
    fresh = tmp_path / "fresh"
    fresh.write_text("HELLO")
    os.utime(fresh, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(fresh, old_file)  # as an atomic writer does: another inode
    assert cache.of(old_file, "text", count) != first


def test_a_file_written_a_moment_ago_is_not_trusted(tmp_path: Path, old_file: Path) -> None:
    count = Counter()
    cache = DigestCache(tmp_path / "digests.json")
    set_age(old_file, 0.5)
    first = cache.of(old_file, "text", count)
    stat = old_file.stat()
    old_file.write_text("HELLO")
    os.utime(old_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, time and inode
    assert cache.of(old_file, "text", count) != first


def test_a_file_that_changes_under_the_reader_is_refused(tmp_path: Path, old_file: Path) -> None:
    def compute(path: Path) -> dict[str, str]:
        path.write_text("longer than before")
        return {"file": "?"}

    with pytest.raises(StorageError, match="written to while it was being read"):
        DigestCache(tmp_path / "digests.json").of(old_file, "text", compute)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"format": 99}', '{"format": 1, "entries": {"text:x": 3}}', "\x00\xff"],
)
def test_a_damaged_cache_is_an_empty_one(tmp_path: Path, old_file: Path, damage: str) -> None:
    path = tmp_path / "digests.json"
    path.write_text(damage)
    count = Counter()
    for _ in range(2):
        DigestCache(path).of(old_file, "text", count)
    assert count.calls == 1


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
