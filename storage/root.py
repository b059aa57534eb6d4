"""The root folder of a store: made, or refused in one line with what to do about it."""

import errno
import json
import os
from pathlib import Path

from storage import disk
from storage.errors import StorageError
from storage.layout import Layout
from storage.manifest import FORMAT, require_format

FORMAT_NAME = "FORMAT.json"
_BY_EFFECTIVE_USER = os.access in os.supports_effective_ids


def prepare_root(layout: Layout) -> None:
    """Make a store's folders where they are absent, check its format and that it can be written.

    Raises:
        StoreVersionError: a newer version of the program wrote it.
        StorePermissionError: it cannot be written.
        StoreFullError: the disk is full.
        StorageError: the root is a file, or its format file is damaged.
    """
    try:
        layout.tmp.mkdir(parents=True, exist_ok=True)
        for folder in (layout.root, layout.tmp):
            if not os.access(folder, os.W_OK | os.X_OK, effective_ids=_BY_EFFECTIVE_USER):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        marker = layout.root / FORMAT_NAME
        if not marker.exists():
            disk.replace_file(marker, _marker_text().encode())
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(
            f"cannot make a store at {layout.root}: {error.filename} is not a folder; "
            "choose another data directory with --home"
        ) from error
    except OSError as error:
        if disk.is_disk_full(error):
            raise disk.full_error("a new store", layout.root, 1) from error
        if disk.is_denied(error):
            raise disk.denied_error(layout.root, error) from error
        raise
    _require_known_format(marker)


def _require_known_format(marker: Path) -> None:
    try:
        found = json.loads(marker.read_bytes())["format"]
        if not isinstance(found, int):
            raise TypeError(f"its format is {found!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{marker} is damaged ({error}): "
            f"if the folder is a store, write {_marker_text()} into it"
        ) from error
    require_format(found, str(marker.parent))


def _marker_text() -> str:
    return json.dumps({"format": FORMAT})
