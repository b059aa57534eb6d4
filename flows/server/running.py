"""Where the servers of `eigenpress up` are: a file, believed while the lock beside it is held."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from compress_core.errors import ConfigError
from storage.errors import StorageError

LOCK, FILE = "up.lock", "up.json"


def running_server(home: Path) -> str | None:
    """The API of the Prefect server that `up` runs; None where none runs.

    The lock goes with the process that holds it, so what a killed one leaves is not believed.

    Raises:
        StorageError: It runs, and its file cannot be read.
    """
    found = _read(home)
    return None if found is None else found["api"]


def _read(home: Path) -> dict[str, str] | None:
    try:
        with open(home / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        pass
    except OSError as error:
        raise StorageError(f"cannot read {home / LOCK}: {error.strerror}") from None
    try:
        found = json.loads((home / FILE).read_text(encoding="utf-8"))
        return {name: str(found[name]) for name in ("api", "pid")}
    except FileNotFoundError:
        return None  # it is only starting
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{home / FILE}, in which `eigenpress up` says where it is, cannot be read ({error}); "
            "end that and start it again"
        ) from None


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Holds the data directory for the one `up` that may run on it.

    Raises:
        ConfigError: Another runs.
    """
    with open(home / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = _read(home) or {}
            where = f" at {found['api']} (process {found['pid']})" if found else ""
            raise ConfigError(
                f"`eigenpress up` runs already for {home}{where}; end it, or choose another data "
                "directory with --home"
            ) from None
        (home / FILE).unlink(missing_ok=True)  # of one that was killed
        try:
            yield
        finally:
            (home / FILE).unlink(missing_ok=True)


def announce(home: Path, addresses: Mapping[str, str]) -> None:
    """Says where the servers are, for the commands on this data directory."""
    draft = home / f"{FILE}.new"
    draft.write_text(json.dumps({**addresses, "pid": os.getpid()}, indent=1), encoding="utf-8")
    draft.replace(home / FILE)
