"""Digests of files outside the store (models, texts), remembered like git's index remembers blobs.

The digest names the bytes, never the path: moving a model does not change any key.
"""

import json
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from storage.disk import checksum, replace_file
from storage.errors import StorageError

PREFIX = "xxh3:"  # of 128 bits; the digests guard against change, not against an adversary
FORMAT = 1
RACY_NS = 2_000_000_000  # a file this fresh may change again without its mtime showing it

_LARGEST_HEADER = 100_000_000
_BITS = {
    "F4": 4, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def file_digest(path: Path) -> str:
    """Return the content digest of a file: "xxh3:" and the 32 hex digits of its xxh3_128."""
    return PREFIX + checksum(path)


class DigestCache:
    """Digests remembered by (real path, size, mtime, inode, kind), in one JSON file.

    Safe with threads and with several processes (the last writer wins); a damaged file counts as an
    empty cache.

    Args:
        path: the JSON file; made at the first result.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._entries = self._load()

    def of(
        self, file: Path, kind: str, compute: Callable[[Path], dict[str, str]]
    ) -> dict[str, str]:
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
        before = _stamp(real)
        with self._lock:
            known = self._entries.get(name)
        if known is not None and known["stamp"] == before:
            return dict(known["value"])
        started = time.time_ns()
        value = compute(real)
        if _stamp(real) != before:
            raise StorageError(
                f"{file} was written to while it was being read; run again when it is finished"
            )
        if before[1] + RACY_NS <= started:
            self._remember(name, {"stamp": before, "value": value})
        return dict(value)

    def _remember(self, name: str, entry: dict[str, Any]) -> None:
        with self._lock:
            self._entries = {**self._load(), **self._entries, name: entry}
            text = json.dumps({"format": FORMAT, "entries": self._entries})
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, text.encode())

    def _load(self) -> dict[str, Any]:
        """Return the entries on disk that have the right form; what has not is computed again."""
        try:
            content = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return {}
        entries = content.get("entries")
        return (
            {name: item for name, item in entries.items() if _is_entry(item)}
            if isinstance(entries, dict)
            else {}
        )


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _is_entry(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("stamp"), list)
        and isinstance(item.get("value"), dict)
        and all(isinstance(digest, str) for digest in item["value"].values())
    )


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
