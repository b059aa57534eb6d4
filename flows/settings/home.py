"""The data directory, checked before anything heavy is imported."""

import os
from pathlib import Path

from storage.errors import StorageError, StorePermissionError

DIGESTS, MACHINE = "digests.json", "machine.json"
RUNS = "runs"
FILES = (DIGESTS, MACHINE)
FOLDERS = ("store", RUNS, "models", "reports", "demo", "prefect")
"""What the data directory holds; other things may lie beside it."""


def default_home() -> Path:
    """The data directory: EIGENPRESS_HOME, else ~/.eigenpress."""
    return Path(os.environ.get("EIGENPRESS_HOME") or "~/.eigenpress").expanduser()


def default_store() -> str | None:
    """Address of the bucket that artifacts are shared in: EIGENPRESS_STORE, else none."""
    return os.environ.get("EIGENPRESS_STORE") or None


_opened: Path | None = None


def opened_home() -> Path | None:
    """The data directory of this process's command; None before it is known."""
    return _opened


def use_home(home: Path) -> Path:
    """Remembers a data directory as that of the command, and returns it without ``~``."""
    global _opened
    _opened = home.expanduser()
    return _opened


def open_home(home: Path) -> None:
    """Makes the data directory.

    Raises:
        StorePermissionError: It cannot be made or written.
        StorageError: As `check_places`.
    """
    probe = home / ".writable"
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # of another command that begins at the same moment
        use_home(home)
    except (FileExistsError, NotADirectoryError):
        raise StorePermissionError(
            f"the data directory {home} is a file or lies below one; "
            "choose another with --home or EIGENPRESS_HOME"
        ) from None
    except OSError as error:
        raise StorePermissionError(
            f"cannot write to the data directory {home}: {error.strerror}; "
            "choose another with --home or EIGENPRESS_HOME"
        ) from None
    check_places(home)


def check_places(home: Path) -> None:
    """Refuses a data directory in which something is in the way, before any work.

    Raises:
        StorageError: There is a file where a folder belongs, or a folder where a file does.
    """
    for names, right, wrong in ((FILES, "file", "folder"), (FOLDERS, "folder", "file")):
        for name in names:
            place = home / name
            if place.exists() and place.is_dir() != (right == "folder"):
                raise StorageError(
                    f"{place} is a {wrong} where a {right} belongs: move it away and run the same "
                    "command again"
                )
