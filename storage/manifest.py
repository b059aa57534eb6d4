"""The manifest of an artifact: what it is, what it was made from, and every file with its checksum.

It is the last file written into a draft, so its presence means that the artifact is complete.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from storage.errors import ArtifactCorruptError, StoreVersionError
from storage.keys import canonical_json

FORMAT = 1
MANIFEST_NAME = "manifest.json"
ARRAYS_FOLDER = "arrays"
FILES_FOLDER = "files"


@dataclass(frozen=True)
class ArrayRecord:
    """One array of an artifact.

    Attributes:
        dtype: numpy name of the stored type, such as "float32" or "uint16".
        logical_dtype: what the bits mean: "bfloat16" for bf16 kept as uint16, else `dtype`.
        shape: the array's shape.
        digest: xxh3_128 of its little-endian C-order bytes, hexadecimal.
    """

    dtype: str
    logical_dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact: size in bytes and xxh3_128 of its bytes, hexadecimal."""

    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What is known of a committed artifact.

    Attributes:
        key: sha256 of the recipe, 64 hex digits.
        stage: name of the stage that made it.
        unit: label of what it is about (a layer, a tap, a model).
        digest: identity of the content (see `content_digest`).
        recipe: everything that decided the numbers.
        inputs: role -> {"key": key of the artifact or None, "digest": digest of the content used}.
        attrs: small results, part of the digest.
        info: circumstances (seconds, device, versions), not part of the digest.
        arrays: name -> record.
        files: path inside the artifact -> record, for every file but the manifest.
        nbytes: sum of the files' sizes.
        created: time of the commit, ISO 8601 in UTC.
    """

    key: str
    stage: str
    unit: str
    digest: str
    recipe: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str | None]]
    attrs: Mapping[str, Any]
    info: Mapping[str, Any]
    arrays: Mapping[str, ArrayRecord]
    files: Mapping[str, FileRecord]
    nbytes: int
    created: str

    @property
    def input_keys(self) -> list[str]:
        """Keys of the artifacts this one was made from; inputs from outside the store have none."""
        return [key for source in self.inputs.values() if (key := source.get("key"))]

    def to_json(self) -> str:
        """Return the manifest file's text, closed by a checksum of itself."""
        fields = {
            **vars(self),
            "format": FORMAT,
            "arrays": {name: vars(record) for name, record in self.arrays.items()},
            "files": {name: vars(record) for name, record in self.files.items()},
        }
        text = canonical_json(fields)  # here, so that what is no JSON is named
        return canonical_json({**fields, "checksum": xxhash.xxh3_128_hexdigest(text.encode())})

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Read what `to_json` wrote; `where` names the file in errors.

        Raises:
            ArtifactCorruptError: not a whole manifest, or changed since it was written.
            StoreVersionError: written by a newer version of the program.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactCorruptError(f"{where} is not JSON: {error}") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("format"), int):
            raise ArtifactCorruptError(f"{where} is not a manifest: it has no format number")
        checksum = fields.pop("checksum", None)
        # before the format: one flipped bit is no newer version
        if checksum is None or checksum != _checksum(fields):
            raise ArtifactCorruptError(
                f"{where} was changed after it was written (its checksum is wrong)"
            )
        require_format(fields.pop("format"), where)
        fields["arrays"] = {
            name: ArrayRecord(**{**record, "shape": tuple(record["shape"])})
            for name, record in fields["arrays"].items()
        }
        fields["files"] = {name: FileRecord(**record) for name, record in fields["files"].items()}
        return cls(**fields)


def require_format(found: int, where: str) -> None:
    """Refuse what a newer version of the program wrote.

    Raises:
        StoreVersionError: `found` is above the format that this version knows.
    """
    if found > FORMAT:
        raise StoreVersionError(
            f"{where} has store format {found}, this version of the program reads up to {FORMAT}: "
            "upgrade the program, or choose another data directory with --home"
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the artifact in `folder`.

    Raises:
        FileNotFoundError: there is none.
        ArtifactCorruptError: it is damaged.
        StoreVersionError: it was written by a newer version of the program.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except (IsADirectoryError, NotADirectoryError) as error:
        raise ArtifactCorruptError(f"{path} is no file: {error.strerror}") from error
    return Manifest.from_json(text, str(path))


def content_digest(
    arrays: Mapping[str, ArrayRecord], files: Mapping[str, FileRecord], attrs: Mapping[str, Any]
) -> str:
    """Return the sha256 that identifies an artifact's content, whatever its unit, chunks or time.

    Args:
        arrays: name -> record.
        files: path inside the artifact -> record; only those under `files/` count, since the rest
            is how the arrays happen to be laid out.
        attrs: the artifact's attributes.
    """
    payload = {
        path.removeprefix(f"{FILES_FOLDER}/"): record.checksum
        for path, record in files.items()
        if path.startswith(f"{FILES_FOLDER}/")
    }
    content = {
        "arrays": {name: vars(record) for name, record in arrays.items()},
        "files": payload,
        "attrs": attrs,
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _checksum(fields: Mapping[str, Any]) -> str | None:
    """Return the checksum of what a manifest says; None of what no manifest can say."""
    try:
        return xxhash.xxh3_128_hexdigest(canonical_json(fields).encode())
    except (TypeError, ValueError):  # NaN is JSON to Python only
        return None
