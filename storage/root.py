"""The root folder of a store: made, or refused in one line with what to do about it."""

import errno
import os
from pathlib import Path

from storage import disk
from storage.errors import StorageError
from storage.layout import Layout
from storage.manifest import FORMAT, require_format
from storage.records import NoRecordError, read_record, write_record

FORMAT_NAME = "FORMAT.json"
UNSEALED = b'{"format": 1}'  # what versions before the checksum wrote
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
        disk.make_folder(layout.tmp)
        for folder in (layout.root, layout.tmp):
            if not os.access(folder, os.W_OK | os.X_OK, effective_ids=_BY_EFFECTIVE_USER):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except PermissionError as error:
        raise disk.denied_error(layout.root, error) from error
    marker = layout.root / FORMAT_NAME
    if not os.path.lexists(marker):
        write_record(marker, {"format": FORMAT})
    _require_known_format(marker)


def _require_known_format(marker: Path) -> None:
    """Refuse a newer format, if the marker that says so is intact."""
    try:
        if marker.is_file() and marker.read_bytes() == UNSEALED:
            return
        found = read_record(marker).get("format")
        if not isinstance(found, int):
            raise NoRecordError(f"its format is {found!r}")
    except (OSError, NoRecordError) as error:
        raise StorageError(
            f"{marker} is damaged ({error}): "
            "if the folder is a store, delete that file and it is written anew"
        ) from error
    require_format(found, str(marker.parent))
