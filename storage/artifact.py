"""A committed artifact, opened for reading; arrays come as numpy, never as Zarr's types."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from storage.arrays import read_array
from storage.errors import ArtifactCorruptError, ArtifactMissingError
from storage.manifest import ARRAYS_FOLDER, FILES_FOLDER, ArrayRecord, Manifest
from storage.verify import strays

Identity = tuple[int, int] | None


def folder_identity(folder: Path) -> Identity:
    """Return what tells a folder from the next one under its name; None if there is none."""
    try:
        status = os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    # inodes are used again at once; what was renamed into place since changed its times then
    return status.st_ino, status.st_ctime_ns


class Artifact:
    """Read access to one artifact.

    Another process may remove it at any moment. Whatever was read until then is right, and whatever
    is not there any more is missing, never damaged.

    Args:
        folder: where it lies.
        manifest: everything known about it.
        identity: of the folder, from before the manifest was read.

    Attributes:
        manifest: everything known about it.
    """

    def __init__(self, folder: Path, manifest: Manifest, identity: Identity) -> None:
        self.manifest = manifest
        self._folder = folder
        self._identity = identity

    @property
    def attrs(self) -> Mapping[str, Any]:
        """The small JSON results stored with it."""
        return self.manifest.attrs

    @property
    def names(self) -> list[str]:
        """Names of its arrays, sorted."""
        return sorted(self.manifest.arrays)

    def array(self, name: str, rows: int | None = None) -> np.ndarray[Any, Any]:
        """Read an array, or its first `rows` rows without reading the others.

        Args:
            name: one of `names`.
            rows: how many rows from the top, up to the array's length; None for all.

        Returns:
            A fresh array; bf16 comes as its bits in uint16 (see `logical_dtype`).

        Raises:
            ArtifactMissingError: no such array, or the artifact was removed.
            ArtifactCorruptError: bytes that are needed are missing or damaged.
            ValueError: fewer than 0 or more rows than there are.
        """
        shape = self._record(name).shape
        if rows is not None and not (shape and 0 <= rows <= shape[0]):
            raise ValueError(f"array {name!r} of shape {shape} has no first {rows} rows")
        with self._reading():
            return read_array(
                self._folder / ARRAYS_FOLDER, name, None if rows is None else slice(0, rows)
            )

    def logical_dtype(self, name: str) -> str:
        """Return what an array's bits mean: "bfloat16", or the name of its own type."""
        return self._record(name).logical_dtype

    def file(self, relative_path: str) -> Path:
        """Return the path of a payload file (or of a folder of them); do not write to it.

        Raises:
            ArtifactMissingError: the artifact never had it, or was removed.
            ArtifactCorruptError: it should be there and is not, or the folder holds what it should
                not, which a reader of the whole folder would take for a part of it.
        """
        path = self._folder / FILES_FOLDER / relative_path
        known = f"{FILES_FOLDER}/{relative_path}"
        if known not in self.manifest.files:
            self.files(relative_path)
        with self._reading():
            if not path.exists():
                raise ArtifactCorruptError(f"{self._what} lacks its file {relative_path!r}")
            for stray in strays(self._folder, self.manifest, known):
                raise ArtifactCorruptError(
                    f"{self._what}: {self._folder / stray} is not part of it, and what reads the "
                    "folder would take it for one: remove it and run the same command again"
                )
        return path

    def files(self, relative_path: str) -> dict[PurePosixPath, Path]:
        """Return the payload files in a folder: path below it -> where each lies.

        Raises:
            ArtifactMissingError: the artifact never had such a folder.
        """
        start = f"{FILES_FOLDER}/{relative_path}/"
        found = {
            PurePosixPath(name.removeprefix(start)): self._folder / name
            for name in self.manifest.files
            if name.startswith(start)
        }
        if not found:
            raise ArtifactMissingError(f"{self._what} has no file {relative_path!r}")
        return found

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Tell an artifact that was removed meanwhile from one that is damaged."""
        removed = ArtifactMissingError(f"{self._what} was removed while it was being read")
        try:
            yield
        except (ArtifactCorruptError, OSError) as error:
            if folder_identity(self._folder) != self._identity:
                raise removed from error
            raise
        # whoever deletes it renames it first, so what was read before that was whole
        if folder_identity(self._folder) != self._identity:
            raise removed

    def _record(self, name: str) -> ArrayRecord:
        try:
            return self.manifest.arrays[name]
        except KeyError:
            raise ArtifactMissingError(
                f"{self._what} has no array {name!r}, only {self.names}"
            ) from None

    @property
    def _what(self) -> str:
        return f"{self.manifest.stage} {self.manifest.unit} ({self.manifest.key[:12]})"
