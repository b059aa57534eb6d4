"""Where things lie: artifacts in `<stage>/<key[:2]>/<key>/`, and `tmp`, `index` and `leases`."""

import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from storage.errors import StorageError

TMP = "tmp"
INDEX = "index"
LEASES = "leases"
_OWN = (TMP, INDEX, LEASES)
_SHELF = re.compile(r"[0-9a-f]{2}")
_KEY = re.compile(r"[0-9a-f]{64}")
_STAGE = re.compile(r"[a-z][a-z0-9_-]*")
_ARRAY = re.compile(r"(?!__)[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Layout:
    """Paths below the root of one store."""

    root: Path

    @property
    def tmp(self) -> Path:
        """Folder of drafts and of things on their way out."""
        return self.root / TMP

    def artifact(self, stage: str, key: str) -> Path:
        """Folder of one artifact, whether it exists or not."""
        return self.root / stage / key[:2] / key

    def scratch(self, key: str) -> Path:
        """Return a fresh name in `tmp`; it carries the process, so that gc can tell who left it."""
        return self.tmp / f"{key}-{os.getpid()}-{secrets.token_hex(4)}"

    @property
    def leases(self) -> Path:
        """Folder of the leases on keys that are being computed."""
        return self.root / LEASES

    def index(self, stage: str, unit: str) -> Path:
        """Folder that lists the keys of one unit; named by hash, since units are free text."""
        return self.root / INDEX / stage / xxhash.xxh3_64_hexdigest(unit.encode())

    def stages(self) -> list[str]:
        """Names of the stages that have a folder, sorted."""
        with os.scandir(self.root) as entries:
            names = [
                entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and entry.name not in _OWN
            ]
        return sorted(name for name in names if _STAGE.fullmatch(name))

    def strays(self) -> Iterator[Path]:
        """Yield what has no place in the folders of the root, its stages, shelves and units.

        The root's own files count, too; the folders of drafts and of leases are free.
        """
        yield from _foreign(self.root, _STAGE)
        yield from _foreign(self.root / INDEX, _STAGE)
        for stage in self.stages():
            yield from _foreign(self.root / stage, _SHELF)
            for shelf in _folders(self.root / stage, ""):
                if _SHELF.fullmatch(shelf.name):
                    yield from _foreign(shelf, _KEY, shelf.name)

    def artifacts(
        self, stage: str | None = None, prefix: str = ""
    ) -> Iterator[tuple[str, str, Path]]:
        """Yield (stage, key, folder) of all in place whose key starts with `prefix`, sorted."""
        for name in self.stages() if stage is None else [stage]:
            for shelf in _folders(self.root / name, prefix[:2]):
                for folder in _folders(shelf, prefix):
                    if _KEY.fullmatch(folder.name):
                        yield name, folder.name, folder


def _folders(parent: Path, prefix: str) -> list[Path]:
    found = (parent / name for name in _names(parent) if name.startswith(prefix))
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _foreign(parent: Path, names: re.Pattern[str], prefix: str = "") -> Iterator[Path]:
    """Yield what is no folder, or one of another name."""
    for name in _names(parent):
        path = parent / name
        right = names.fullmatch(name) and name.startswith(prefix)
        if not (right and path.is_dir() and not path.is_symlink()):
            yield path


def _names(parent: Path) -> list[str]:
    try:
        return sorted(os.listdir(parent))
    except (FileNotFoundError, NotADirectoryError):
        return []  # no such stage yet, emptied by another process, or a file in its place


def check_key(key: str) -> str:
    """Return `key` if it is a sha256 in lower-case hexadecimal.

    Raises:
        StorageError: it is not.
    """
    if not _KEY.fullmatch(key):
        raise StorageError(
            f"a key is 64 lower-case hexadecimal digits (see recipe_key), got {key!r}"
        )
    return key


def check_stage(stage: str) -> str:
    """Return `stage` if it can name a folder of the store.

    Raises:
        StorageError: it cannot.
    """
    if not _STAGE.fullmatch(stage) or stage in _OWN:
        raise StorageError(
            f"a stage is named in lower-case letters, digits, _ and - "
            f"(not {', '.join(map(repr, _OWN))}), got {stage!r}"
        )
    return stage


def check_array_name(name: str) -> str:
    """Return `name` if it can name an array.

    Raises:
        StorageError: it cannot.
    """
    if not _ARRAY.fullmatch(name):
        raise StorageError(f"an array is named in letters, digits, _ . and -, got {name!r}")
    return name
