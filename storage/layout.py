"""Where things lie: `<root>/<stage>/<key[:2]>/<key>/`, drafts in `tmp`, units in `index`."""

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

    def index(self, stage: str, unit: str) -> Path:
        """Folder that lists the keys of one unit; named by hash, since units are free text."""
        return self.root / INDEX / stage / xxhash.xxh3_64_hexdigest(unit.encode())

    def stages(self) -> list[str]:
        """Names of the stages that have a folder, sorted."""
        with os.scandir(self.root) as entries:
            names = [
                entry.name for entry in entries if entry.is_dir() and entry.name not in (TMP, INDEX)
            ]
        return sorted(name for name in names if _STAGE.fullmatch(name))

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
    try:
        names = sorted(name for name in os.listdir(parent) if name.startswith(prefix))
    except FileNotFoundError:  # no such stage yet, or emptied by another process meanwhile
        return []
    return [path for name in names if (path := parent / name).is_dir()]


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
    if not _STAGE.fullmatch(stage) or stage in (TMP, INDEX):
        raise StorageError(
            f"a stage is named in lower-case letters, digits, _ and - "
            f"(not {TMP!r}, {INDEX!r}), got {stage!r}"
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
