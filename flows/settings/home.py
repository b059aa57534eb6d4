"""The data directory, checked before anything heavy is imported."""

from pathlib import Path

from storage.errors import StorePermissionError


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
