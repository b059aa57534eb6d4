"""A committed artifact, opened for reading; arrays come as numpy, never as Zarr's types."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from storage.arrays import read_array
from storage.errors import ArtifactCorruptError, ArtifactMissingError
from storage.manifest import ARRAYS_FOLDER, FILES_FOLDER, ArrayRecord, Manifest


class Artifact:
    """Read access to one artifact.

    Attributes:
        manifest: everything known about it.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._folder = folder

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
            ArtifactMissingError: no such array.
            ArtifactCorruptError: bytes that are needed are missing or damaged.
            ValueError: fewer than 0 or more rows than there are.
        """
        shape = self._record(name).shape
        if rows is not None and not (shape and 0 <= rows <= shape[0]):
            raise ValueError(f"array {name!r} of shape {shape} has no first {rows} rows")
        return read_array(
            self._folder / ARRAYS_FOLDER, name, None if rows is None else slice(0, rows)
        )

    def logical_dtype(self, name: str) -> str:
        """Return what an array's bits mean: "bfloat16", or the name of its own type."""
        return self._record(name).logical_dtype

    def file(self, relative_path: str) -> Path:
        """Return the path of a payload file (or of a folder of them); do not write to it.

        Raises:
            ArtifactMissingError: the artifact never had it.
            ArtifactCorruptError: it should be there and is not.
        """
        path = self._folder / FILES_FOLDER / relative_path
        known = f"{FILES_FOLDER}/{relative_path}"
        if known not in self.manifest.files and not any(
            name.startswith(f"{known}/") for name in self.manifest.files
        ):
            raise ArtifactMissingError(f"{self._what} has no file {relative_path!r}")
        if not path.exists():
            raise ArtifactCorruptError(f"{self._what} lacks its file {relative_path!r}")
        return path

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
