"""Is an artifact what its manifest says? Shallow (existence, sizes) or deep (every byte)."""

import os
from pathlib import Path

from storage.disk import checksum, each
from storage.manifest import Manifest

Signature = tuple[tuple[int, int, int], ...]


def shallow_problems(folder: Path, manifest: Manifest) -> list[str]:
    """List files that are missing or have the wrong size, in words."""
    found = []
    for name, record in manifest.files.items():
        try:
            size = os.stat(folder / name).st_size
        except FileNotFoundError:
            found.append(f"{name} is missing")
            continue
        if size != record.size:
            found.append(f"{name} has {size} bytes instead of {record.size}")
    return found


def deep_problems(folder: Path, manifest: Manifest) -> list[str]:
    """List files that are missing, have the wrong size or other bytes, in words."""
    found = shallow_problems(folder, manifest)
    if found:
        return found
    sums = each(lambda name: checksum(folder / name), manifest.files, manifest.nbytes)
    return [
        f"{name} was changed after it was written (its checksum is wrong)"
        for (name, record), actual in zip(manifest.files.items(), sums, strict=True)
        if actual != record.checksum
    ]


def signature(folder: Path, manifest: Manifest) -> Signature | None:
    """Return what tells untouched files from touched ones unread; None if one is missing."""
    try:
        stats = [os.stat(folder / name) for name in manifest.files]
    except FileNotFoundError:
        return None
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


class Trust:
    """Which artifacts this process has verified, and how their files looked then.

    An artifact stays trusted until one of its files is replaced, resized or touched.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[str, Signature]] = {}

    def holds(self, folder: Path, manifest: Manifest) -> bool:
        """Tell whether this very artifact was verified and its files not touched since."""
        known = self._seen.get(folder)
        return known is not None and known == (manifest.digest, signature(folder, manifest))

    def grant(self, folder: Path, manifest: Manifest, seen: Signature) -> None:
        """Remember that the files, as they looked in `seen`, hold what the manifest says."""
        self._seen[folder] = (manifest.digest, seen)
