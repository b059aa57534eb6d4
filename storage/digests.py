"""Digests of files outside the store (models, texts), remembered like git's index remembers blobs.

The digest names the bytes, never the path: moving a model does not change any key.
"""

import json
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from storage.disk import checksum
from storage.errors import StorageError
from storage.records import NoRecordError, read_record, write_record
from storage.stamps import file_stamp, tells_changes

PREFIX = "xxh3:"  # of 128 bits; the digests guard against change, not against an adversary
FORMAT = 2  # of the file; 1 knew a file by what unpacking an archive sets, and is not believed
RACY_NS = 2_000_000_000  # a file this fresh may change again without its times showing it

_LARGEST_HEADER = 100_000_000
_BITS = {
    "F4": 4, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

Compute = Callable[[Path], dict[str, str]]


def file_digest(path: Path) -> str:
    """Return the content digest of a file: "xxh3:" and the 32 hex digits of its xxh3_128."""
    return PREFIX + checksum(path)


class DigestCache:
    """Digests remembered by (real path, stamp, kind), in one JSON file.

    Safe with threads and with several processes (the last writer wins); a damaged file counts as an
    empty cache.

    Args:
        path: the JSON file; made at the first result.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._entries = self._load()
        self._used: dict[str, _Used] = {}

    def of(self, file: Path, kind: str, compute: Compute) -> dict[str, str]:
        """Return `compute(file)`, from memory if the file is the one it was computed of.

        Args:
            file: the file.
            kind: what `compute` computes; results of different kinds do not mix.
            compute: from the path to name -> digest.

        Raises:
            StorageError: the file was written to while it was being read.
        """
        real = Path(os.path.realpath(file))
        name = f"{kind}:{real}"
        stamp = file_stamp(real)
        with self._lock:
            known = self._entries.get(name)
        if known is not None and known["stamp"] == stamp and tells_changes(real):
            value = known["value"]
        else:
            value = self._compute(file, real, name, compute)
        with self._lock:
            self._used[name] = _Used(file, real, stamp, value, compute)
        return dict(value)

    def check_unchanged(self, but: str | None = None) -> None:
        """Make sure that every file that was asked for still is what its digest says.

        Called before a result is kept: it was computed from what the files held in between.

        Args:
            but: a kind of files that does not matter to it.

        Raises:
            StorageError: one was changed or replaced.
        """
        for name, used in list(self._used.items()):
            if but is not None and name.startswith(f"{but}:"):
                continue
            try:
                stamp = file_stamp(used.real)
                if stamp == used.stamp and os.path.realpath(used.file) == str(used.real):
                    continue
                same = used.compute(Path(os.path.realpath(used.file))) == used.value
            except OSError:
                same = False
            if not same:
                raise StorageError(
                    f"{used.file} was changed while it was in use, so nothing computed from it "
                    "since is kept; run the same command again"
                )
            with self._lock:
                self._used[name] = replace(used, stamp=stamp)

    def _compute(self, file: Path, real: Path, name: str, compute: Compute) -> dict[str, str]:
        """Compute, and remember it where a later change of the file is sure to show."""
        settled = _settle(real)
        before, started = file_stamp(real), time.time_ns()
        value = compute(real)
        if file_stamp(real) != before:
            raise StorageError(
                f"{file} was written to while it was being read; run again when it is finished"
            )
        # a time in the future says nothing of when the file was written: the clock was set back
        if settled and max(before[1:3]) + RACY_NS <= started and tells_changes(real):
            self._remember(name, {"stamp": before, "value": value})
        return value

    def _remember(self, name: str, entry: dict[str, Any]) -> None:
        with self._lock:
            self._entries = {**self._load(), **self._entries, name: entry}
            write_record(self._path, {"format": FORMAT, "entries": self._entries})

    def _load(self) -> dict[str, Any]:
        """Return the entries on disk that have the right form; what has not is computed again."""
        try:
            content = read_record(self._path)
        except (FileNotFoundError, NoRecordError):
            return {}
        entries = content.get("entries")
        if content.get("format") != FORMAT or not isinstance(entries, dict):
            return {}
        return {name: item for name, item in entries.items() if _is_entry(item)}


@dataclass(frozen=True)
class _Used:
    """A file that was asked for: where it was and looked like then, and what came out."""

    file: Path
    real: Path
    stamp: list[int]
    value: dict[str, str]
    compute: Compute


def _is_entry(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("stamp"), list)
        and isinstance(item.get("value"), dict)
        and all(isinstance(digest, str) for digest in item["value"].values())
    )


def _settle(path: Path) -> bool:
    """Write out what a memory map has changed: only then does its next change move the times."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:  # a file that cannot be synced is read, and not remembered
        return False
    return True


def safetensors_digests(path: Path) -> dict[str, str]:
    """Return the digest of every tensor of a safetensors file, read straight from its bytes.

    Args:
        path: the file.

    Returns:
        tensor name -> "xxh3:" + xxh3_128 over its dtype, shape and bytes, not its name.

    Raises:
        StorageError: the file is not whole or not safetensors; names the file.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise StorageError(
                f"{path} is not a safetensors file: its header claims {length} of {size} bytes"
            )
        try:
            header = json.loads(file.read(length))
            tensors = {
                name: _extent(entry) for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{path} has a malformed safetensors header: {error!r}") from error
        start = 8 + length
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as data,
        ):
            digests = {}
            for name, (label, begin, end) in tensors.items():
                if start + end > size:
                    raise StorageError(
                        f"{path} is cut short: tensor {name!r} ends at byte {start + end} of {size}"
                    )
                digest = xxhash.xxh3_128(label.encode())
                with data[start + begin : start + end] as part:
                    digest.update(part)
                digests[name] = PREFIX + digest.hexdigest()
    return digests


def _extent(entry: dict[str, Any]) -> tuple[str, int, int]:
    """Return (dtype and shape as text, begin, end) of one header entry; refuse a contradiction."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, begin, end]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"negative or fractional number in {entry}")
    bits = _BITS[dtype]
    for number in shape:
        bits *= number
    if bits != 8 * (end - begin):
        raise ValueError(f"{dtype} of shape {shape} does not fill bytes {begin} to {end}")
    return f"{dtype}{list(shape)}", begin, end
