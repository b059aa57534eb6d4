"""Which files Python opens while a task is read or run: what its configuration does not show."""

import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compress_core.hf.lm_eval_code import is_installed

_PROGRAMS = ("subprocess.Popen", "os.system", "os.posix_spawn", "sqlite3.connect")
_SYSTEM = tuple(map(Path, ("/proc", "/sys", "/dev", "/etc")))
_MEMORY = Path("/dev/shm")  # among the system's folders, and anybody's
_OWN = Path(__file__).resolve().parents[1]


class Watch:
    """What one thread opened.

    Attributes:
        opened: Files that were opened to be read, and programs that were started.
    """

    def __init__(self) -> None:
        self.opened: set[str] = set()

    def files(self) -> set[Path]:
        """The files among it that are the user's own and still there."""
        found = set()
        for name in self.opened:
            with suppress(OSError, ValueError):
                path = _source(Path(name).resolve())
                if path.is_file() and not _is_ours(path):
                    found.add(path)
        return found

    def programs(self) -> set[str]:
        """What may have read anything: other programs and databases."""
        return {name.partition(" ")[0] for name in self.opened if name.startswith(_PROGRAMS)}


def _source(path: Path) -> Path:
    """A module's source, of its compiled form."""
    if path.suffix == ".pyc":
        with suppress(ValueError):
            return Path(importlib.util.source_from_cache(str(path)))
    return path


def _is_ours(path: Path) -> bool:
    """Whether a file belongs to Python, a package, a cache or the system."""
    from datasets import config
    from huggingface_hub import constants

    caches = [config.HF_DATASETS_CACHE, config.HF_MODULES_CACHE, constants.HF_HOME]
    roots = [_OWN, *map(Path, caches), scratch()]
    if not path.is_relative_to(_MEMORY.resolve()):
        roots += _SYSTEM
    return is_installed(path) or any(path.is_relative_to(root.resolve()) for root in roots)


def scratch() -> Path:
    """A folder for what datasets makes of local files, gone with the process.

    Its own cache takes a file for unchanged that has the same path and mtime.
    """
    global _scratch
    if _scratch is None:
        _scratch = tempfile.TemporaryDirectory(prefix="eigenpress-", ignore_cleanup_errors=True)
    return Path(_scratch.name)


_scratch: tempfile.TemporaryDirectory[str] | None = None
_watches: dict[int, Watch] = {}  # by thread
_hooked = False


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Notes in ``watch`` what this thread opens meanwhile."""
    global _hooked
    if not _hooked:  # Python has no way to take a hook out again
        sys.addaudithook(_note)
        _hooked = True
    thread = threading.get_ident()
    _watches[thread] = watch
    try:
        yield
    finally:
        del _watches[thread]


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watches or (event != "open" and event not in _PROGRAMS):
        return
    watch = _watches.get(threading.get_ident())
    if watch is None:
        return
    if event != "open":
        watch.opened.add(f"{event} {arguments[0]}")
        return
    path, mode, flags = arguments
    if isinstance(path, str | bytes | os.PathLike) and _reads(mode, flags):
        watch.opened.add(os.path.abspath(os.fsdecode(path)))


def _reads(mode: str | None, flags: int) -> bool:
    if mode is None:
        return flags & os.O_ACCMODE != os.O_WRONLY
    return "r" in mode or "+" in mode
