"""Small JSON files of the data directory: an object with a format number, closed by a checksum.

The checksum is looked at first: one flipped bit must not pass for another format, or for another
digest.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from storage.disk import make_folder, replace_file

CHECKSUM = "checksum"


class NoRecordError(ValueError):
    """A file that is not a whole record, with the reason."""


def write_record(path: Path, fields: Mapping[str, Any], indent: int | None = None) -> None:
    """Put a record at `path`, at once; its folder is made where it is absent.

    Args:
        path: the file.
        fields: plain JSON data, "format" among it.
        indent: for people who read it.

    Raises:
        StorageError: it cannot be written.
    """
    make_folder(path.parent)
    replace_file(path, seal(fields, indent))


def read_record(path: Path, unsealed: bool = False) -> dict[str, Any]:
    """Read what `write_record` wrote, less its checksum.

    Args:
        path: the file.
        unsealed: take one with neither format nor checksum, as earlier versions wrote them.

    Raises:
        FileNotFoundError: there is none.
        NoRecordError: it is no whole record, or was changed since it was written.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NoRecordError(f"it cannot be read: {error.strerror}") from error
    return unseal(text, unsealed)


def seal(fields: Mapping[str, Any], indent: int | None = None) -> bytes:
    """Return a record's bytes; arguments as of `write_record`."""
    whole = {**fields, CHECKSUM: _checksum(fields)}
    return json.dumps(whole, ensure_ascii=False, indent=indent).encode()


def unseal(text: bytes, unsealed: bool = False) -> dict[str, Any]:
    """Return what `seal` was given; arguments as of `read_record`.

    Raises:
        NoRecordError: it is no whole record, or was changed since it was written.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoRecordError(f"it is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise NoRecordError("it is not a JSON object")
    if unsealed and CHECKSUM not in fields and "format" not in fields:
        return fields
    if fields.pop(CHECKSUM, None) != _checksum(fields):
        raise NoRecordError("it was changed after it was written (its checksum is wrong)")
    return fields


def _checksum(fields: Mapping[str, Any]) -> str:
    plain = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(plain.encode())
