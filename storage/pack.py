"""All files of an artifact as one object: one after another, as the manifest lists them.

Few large requests in place of many small ones; the sizes in the manifest say where each file lies,
so that any part of it can be read alone.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import xxhash

from storage import disk
from storage.manifest import Manifest
from storage.objects import Objects

PIECE = 16 << 20


def places(manifest: Manifest) -> dict[str, int]:
    """Return where each file begins: path inside the artifact -> offset in bytes."""
    found, offset = {}, 0
    for name in sorted(manifest.files):
        found[name] = offset
        offset += manifest.files[name].size
    return found


def pack(manifest: Manifest, folder: Path) -> Iterator[bytes]:
    """Yield the bytes of an artifact's files, in pieces."""
    for name in sorted(manifest.files):
        with open(folder / name, "rb", buffering=0) as file:
            while piece := file.read(PIECE):
                yield piece


def unpack(objects: Objects, payload: str, manifest: Manifest, folder: Path) -> bool:
    """Write the files of an artifact below `folder`, several pieces at a time.

    What is missing at the end of the object is missing in the files.

    Returns:
        Whether there is such an object, if the files hold anything.
    """
    begins = places(manifest)
    with ExitStack() as opened:
        handles = {}
        for name in begins:
            disk.make_folder((folder / name).parent)
            file = opened.enter_context(open(folder / name, "xb", buffering=0))
            handles[name] = file.fileno()

        def fetch(start: int) -> bool:
            try:
                data = memoryview(objects.read(payload, start, min(PIECE, manifest.nbytes - start)))
            except FileNotFoundError:
                return False
            for name, begin in begins.items():
                first = max(start, begin)
                last = min(start + len(data), begin + manifest.files[name].size)
                if first < last:
                    _write(handles[name], data[first - start : last - start], first - begin)
            return True

        return all(disk.each(fetch, range(0, manifest.nbytes, PIECE)))


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count


def problems_of(objects: Objects, payload: str, manifest: Manifest) -> list[str]:
    """List files of an artifact that do not hold what its manifest says, in words."""
    if not manifest.nbytes:
        return []
    found = objects.stat(payload)
    if found is None:
        return [f"{payload} is missing"]
    if found.size != manifest.nbytes:
        return [f"{payload} has {found.size} bytes instead of {manifest.nbytes}"]
    begins = places(manifest)

    def problem(name: str) -> str | None:
        record, digest = manifest.files[name], xxhash.xxh3_128()
        end = begins[name] + record.size
        for start in range(begins[name], end, PIECE):
            digest.update(objects.read(payload, start, min(PIECE, end - start)))
        if digest.hexdigest() == record.checksum:
            return None
        return f"{name} was changed after it was written (its checksum is wrong)"

    return [line for line in disk.each(problem, begins) if line is not None]
