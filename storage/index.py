"""Which keys were committed for a unit: an empty file `index/<stage>/<hash of unit>/<key>` each.

It only speeds up "what did this unit look like before"; entries may be stale, and `rebuild_index`
makes it anew.
"""

import os
from collections.abc import Iterable
from contextlib import suppress

from storage import disk
from storage.errors import StorageError
from storage.layout import INDEX, Layout


def add_to_index(layout: Layout, stage: str, unit: str, key: str) -> None:
    """Note that `key` belongs to `unit`."""
    folder = layout.index(stage, unit)
    disk.make_folder(folder)
    with disk.writing(folder / key):
        (folder / key).touch()


def keys_in_index(layout: Layout, stage: str, unit: str) -> list[str]:
    """List the keys noted for a unit, sorted; some may be gone from the store."""
    try:
        return sorted(os.listdir(layout.index(stage, unit)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def drop_from_index(layout: Layout, stage: str, unit: str, key: str) -> None:
    """Forget that `key` belongs to `unit`."""
    with suppress(FileNotFoundError, NotADirectoryError):
        (layout.index(stage, unit) / key).unlink()


def rebuild_index(layout: Layout, entries: Iterable[tuple[str, str, str]]) -> None:
    """Replace the whole index by (stage, unit, key) entries; a crash leaves none, never half."""
    fresh = Layout(layout.scratch("index"))
    disk.make_folder(fresh.root / INDEX)
    for stage, unit, key in entries:
        add_to_index(fresh, stage, unit, key)
    index = layout.root / INDEX
    if index.is_dir():
        disk.remove_tree(index)
    try:
        with disk.writing(index):
            os.rename(fresh.root / INDEX, index)
    except StorageError:
        if not index.is_dir():  # else another process rebuilt it at the same time, as well as we
            raise
    finally:
        disk.remove_tree(fresh.root)
