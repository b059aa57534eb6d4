"""The data directory, checked before anything heavy is imported."""

import os
from pathlib import Path

from storage.errors import StorePermissionError


def default_home() -> Path:
    """The data directory: EIGENPRESS_HOME, else ~/.eigenpress."""
    return Path(os.environ.get("EIGENPRESS_HOME") or "~/.eigenpress").expanduser()


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
    """
    probe = home / ".writable"
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
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
