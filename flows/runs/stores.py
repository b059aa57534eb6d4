"""The store of a data directory: a folder in it, or a bucket with that folder in front."""

from collections.abc import Callable, Collection
from pathlib import Path

from storage.store import Store

FOLDER = "store"
PATIENCE = 3
"""How often a bucket is asked again before a command begins; later it is asked for longer."""


def open_store(
    home: Path,
    address: str | None,
    on_problem: Callable[[str], None],
    local_stages: Collection[str] = (),
) -> Store:
    """Opens the store.

    Args:
        home: The data directory.
        address: Of a bucket; None for the folder alone.
        on_problem: Told one line about each damaged artifact that was put aside.
        local_stages: Stages whose artifacts never leave this disk.

    Raises:
        StorageError: It cannot be used, in one sentence.
    """
    if address is None:
        return Store(home / FOLDER, on_problem)
    from storage.bucket import Bucket
    from storage.bucket_store import BucketStore
    from storage.objects import objects_at

    Bucket(objects_at(address, PATIENCE)).check()
    return BucketStore(home / FOLDER, Bucket(objects_at(address)), on_problem, local_stages)
