"""Who works with a store: any number of runs beside one another, or a collection of garbage alone.

A run that goes on has found artifacts that no record names yet; whoever frees what nothing names
would take them away between two stages.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import StoreInUseError
from storage.root import FORMAT_NAME


@contextmanager
def in_use(root: Path) -> Iterator[None]:
    """For the time of a run; waits while garbage is collected. It ends with the process, too."""
    with open(root / FORMAT_NAME, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """For the time of a collection of garbage.

    Raises:
        StoreInUseError: A run goes on.
    """
    with open(root / FORMAT_NAME, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreInUseError(
                f"nothing was freed: a run works with the store at {root}, and what it has made "
                "nobody else knows yet; run the same command again when it has ended"
            ) from None
        yield
