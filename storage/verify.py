"""Is an artifact what its manifest says? Shallow (existence, sizes) or deep (every byte)."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from stat import S_ISREG

from storage.disk import checksum, each
from storage.manifest import FILES_FOLDER, MANIFEST_NAME, Manifest

Signature = tuple[tuple[int, ...], ...]


def shallow_problems(folder: Path, manifest: Manifest) -> list[str]:
    """List files that are missing, are no plain files or have the wrong size, in words."""
    found = []
    for name, record in manifest.files.items():
        try:
            status = os.lstat(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            found.append(f"{name} is missing")
            continue
        if not S_ISREG(status.st_mode):
            found.append(f"{name} is no plain file")
        elif status.st_size != record.size:
            found.append(f"{name} has {status.st_size} bytes instead of {record.size}")
    return found


def strays(folder: Path, manifest: Manifest, below: str = "") -> Iterator[str]:
    """Yield the paths inside an artifact that its manifest does not account for.

    Files, links, and folders that hold nothing it names; readers of single files never see them.

    Args:
        folder: the artifact.
        manifest: its manifest.
        below: only what lies in this folder of it.
    """
    files = {MANIFEST_NAME, *manifest.files}
    above = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    folders = {FILES_FOLDER, *above}

    def walk(inside: str) -> Iterator[str]:
        with os.scandir(folder / inside) as entries:
            inner = {f"{inside}/{entry.name}".lstrip("/"): entry for entry in entries}
        for name, entry in sorted(inner.items()):
            if entry.is_dir(follow_symlinks=False) and name in folders:
                yield from walk(name)
            elif name not in files:  # what is no plain file among those is damage, not a stray
                yield name

    try:
        yield from walk(below)
    except (FileNotFoundError, NotADirectoryError):
        return  # whatever is missing is damage


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
        stats = [os.lstat(folder / name) for name in manifest.files]
    except (FileNotFoundError, NotADirectoryError):
        return None
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)


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


TRUST = Trust()
"""Of this process, whatever store asks."""
