"""Which keys were committed for a unit: an empty file `index/<stage>/<hash of unit>/<key>` each.

It only speeds up "what did this unit look like before"; entries may be stale, and `rebuild_index`
makes it anew.
"""

import errno
import os
from collections.abc import Iterable

from storage.disk import remove_tree
from storage.layout import INDEX, Layout


def add_to_index(layout: Layout, stage: str, unit: str, key: str) -> None:
    """Note that `key` belongs to `unit`."""
    folder = layout.index(stage, unit)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / key).touch()


def keys_in_index(layout: Layout, stage: str, unit: str) -> list[str]:
    """List the keys noted for a unit, sorted; some may be gone from the store."""
    try:
        return sorted(os.listdir(layout.index(stage, unit)))
    except FileNotFoundError:
        return []


def drop_from_index(layout: Layout, stage: str, unit: str, key: str) -> None:
    """Forget that `key` belongs to `unit`."""
    (layout.index(stage, unit) / key).unlink(missing_ok=True)


def rebuild_index(layout: Layout, entries: Iterable[tuple[str, str, str]]) -> None:
    """Replace the whole index by (stage, unit, key) entries; a crash leaves none, never half."""
    fresh = Layout(layout.scratch("index"))
    (fresh.root / INDEX).mkdir(parents=True)
    for stage, unit, key in entries:
        add_to_index(fresh, stage, unit, key)
    remove_tree(layout.root / INDEX)
    try:
        os.rename(fresh.root / INDEX, layout.root / INDEX)
    except OSError as error:  # another process rebuilt it at the same time; theirs is as good
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    remove_tree(fresh.root)
