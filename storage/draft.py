"""An artifact being written: invisible to readers until one rename puts it in place, whole.

Order of writing: payload, manifest, fsync of all files and then of their folders, rename, fsync of
the shelf. A crash at any point leaves an orphan in `tmp` or the complete artifact.
"""

import errno
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from storage import disk
from storage.arrays import array_digest, check_dtype, create_group, write_array
from storage.errors import ArtifactCorruptError, StorageError
from storage.index import add_to_index
from storage.keys import canonical_json
from storage.layout import Layout, check_array_name, check_key, check_stage
from storage.manifest import (
    ARRAYS_FOLDER,
    FILES_FOLDER,
    MANIFEST_NAME,
    ArrayRecord,
    FileRecord,
    Manifest,
    content_digest,
    read_manifest,
)

Inputs = Mapping[str, Mapping[str, str | None]]


class Draft:
    """What the body of `with store.draft(...)` writes into.

    Attributes:
        attrs: small JSON results; they belong to the content.
        info: JSON circumstances (seconds, device, versions); recorded, not part of the content.
    """

    def __init__(
        self,
        layout: Layout,
        key: str,
        stage: str,
        unit: str,
        recipe: Mapping[str, Any],
        inputs: Inputs,
    ) -> None:
        self.attrs: dict[str, Any] = {}
        self.info: dict[str, Any] = {}
        self.key, self.stage, self.unit = check_key(key), check_stage(stage), unit
        canonical_json(
            {"recipe": recipe}
        )  # refuse now what the manifest could not hold after hours of work
        for role, source in inputs.items():
            if source.keys() != {"key", "digest"} or not source["digest"]:
                raise StorageError(
                    f"input {role!r} needs 'key' (or None) and 'digest', got {dict(source)}"
                )
        self._recipe, self._inputs = recipe, inputs
        self._layout = layout
        self._arrays: dict[str, ArrayRecord] = {}
        self._promised: list[str] = []
        self._asked_bytes = 0
        self._manifest: Manifest | None = None
        self._folder = layout.scratch(key)

    def open(self) -> None:
        """Make the draft's folder."""
        disk.make_folder(self._folder / FILES_FOLDER)

    @property
    def manifest(self) -> Manifest:
        """The manifest in the store after the block: this draft's, or that of whoever was faster.

        Raises:
            StorageError: the draft is not committed.
        """
        if self._manifest is None:
            raise StorageError(
                f"the draft of {self.what} is not committed yet: leave its `with` block first"
            )
        return self._manifest

    @property
    def what(self) -> str:
        """The artifact in words, for messages."""
        return f"{self.stage} {self.unit} ({self.key[:12]})"

    def put(self, name: str, array: np.ndarray[Any, Any], logical_dtype: str | None = None) -> None:
        """Write an array.

        Args:
            name: letters, digits, `_`, `.` and `-`; once per artifact.
            array: any shape; bool, integer, float or complex.
            logical_dtype: "bfloat16" for bf16 bits in a uint16 array.

        Raises:
            StorageError: the name is taken or the type cannot be stored.
        """
        if check_array_name(name) in self._arrays:
            raise StorageError(f"array {name!r} is already in the draft of {self.what}")
        logical = check_dtype(name, array, logical_dtype)
        self._asked_bytes += array.nbytes
        if not self._arrays:
            create_group(self._folder / ARRAYS_FOLDER)
        write_array(self._folder / ARRAYS_FOLDER, name, array, logical_dtype)
        self._arrays[name] = ArrayRecord(
            array.dtype.name, logical, array.shape, array_digest(array)
        )

    def add_file(self, relative_path: str) -> Path:
        """Return where to write a payload file (or a folder of them); its parent folder exists.

        Args:
            relative_path: path below the artifact's `files`, with `/` between its parts.

        Raises:
            StorageError: the path is absolute or leaves that folder.
        """
        path = PurePosixPath(relative_path)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise StorageError(
                f"a payload file needs a path below the artifact, got {relative_path!r}"
            )
        target = self._folder / FILES_FOLDER / path
        target.parent.mkdir(parents=True, exist_ok=True)
        self._promised.append(str(path))
        return target

    def commit(self) -> None:
        """Make the draft an artifact, or drop it if another process committed the same key first.

        Raises:
            StorageError: a promised file was not written, or something is no plain file.
            TypeError, ValueError: attrs or info hold something that is not JSON.
        """
        for promised in self._promised:
            if not (self._folder / FILES_FOLDER / promised).exists():
                raise StorageError(f"{self.what}: the promised file {promised!r} was not written")
        manifest = self._seal()
        self._manifest = publish(self._layout, self._folder, manifest)

    def give_way(self, winner: Manifest) -> None:
        """Take note that another artifact has the key, after the commit."""
        self._manifest = winner

    def discard(self) -> None:
        """Delete the draft's folder."""
        disk.remove_tree(self._folder)

    def bytes_needed(self) -> int:
        """Return a lower bound of the bytes this draft needs: asked for, or already written."""
        return max(self._asked_bytes, disk.size_below(self._folder), 1)

    def _seal(self) -> Manifest:
        """Write the manifest, force all to disk; return the manifest as readers will see it."""
        paths = disk.files_below(self._folder)
        sums = disk.each(disk.checksum, paths, sum(path.stat().st_size for path in paths))
        files = {
            path.relative_to(self._folder).as_posix(): FileRecord(path.stat().st_size, checksum)
            for path, checksum in zip(paths, sums, strict=True)
        }
        manifest = Manifest(
            key=self.key,
            stage=self.stage,
            unit=self.unit,
            digest=content_digest(self._arrays, files, self.attrs),
            recipe=self._recipe,
            inputs=self._inputs,
            attrs=self.attrs,
            info=self.info,
            arrays=self._arrays,
            files=files,
            nbytes=sum(record.size for record in files.values()),
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        text = manifest.to_json()
        write_manifest(self._folder, text, paths)
        return Manifest.from_json(text, self.what)


def write_manifest(folder: Path, text: str, paths: list[Path]) -> None:
    """Write the manifest of what lies in `paths` below a draft's folder; force all to disk."""
    (folder / MANIFEST_NAME).write_text(text)
    # all at once, so that the file system can serve them with one commit of its journal
    disk.sync([*paths, folder / MANIFEST_NAME])
    disk.sync(sorted({folder, *(path.parent for path in paths)}))


def publish(layout: Layout, folder: Path, manifest: Manifest) -> Manifest:
    """Make a whole draft the artifact of its key, or drop it if another is there already.

    Args:
        layout: the store's.
        folder: the draft, its manifest in it and all of it on disk.
        manifest: what the manifest says.

    Returns:
        The manifest that is in place then.
    """
    target = layout.artifact(manifest.stage, manifest.key)
    new_shelf = not target.parent.is_dir()
    disk.make_folder(target.parent)
    if new_shelf:
        disk.sync([target.parent.parent])
    # before the rename: an entry without an artifact is harmless, the reverse would hide one
    add_to_index(layout, manifest.stage, manifest.unit, manifest.key)
    while True:
        try:
            os.rename(folder, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            disk.sync([target.parent])
            return manifest
        try:
            winner = read_manifest(target)
        except FileNotFoundError:
            # the winner is damaged, or was moved away this moment: make room and try again
            move_out(layout, target)
        except ArtifactCorruptError:
            move_out(layout, target)
        else:
            disk.remove_tree(folder)
            return winner


def move_out(layout: Layout, folder: Path) -> None:
    """Take an artifact out of the readers' sight by one rename into `tmp`, then delete it."""
    doomed = layout.scratch(folder.name)
    try:
        os.rename(folder, doomed)
    except FileNotFoundError:  # another process was faster
        return
    disk.remove_tree(doomed)
