"""Leases on keys, so that no two processes of a machine compute the same at once.

A lease is a locked file `<root>/leases/<key>`. The kernel ends the lock with its process, so no
clock is asked; a file without a lock says nothing.
"""

import fcntl
import os
import resource
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from storage import disk
from storage.errors import LeaseHeldError, StorageError
from storage.hosts import this_process
from storage.layout import Layout, check_key

SPARE_FILES = 512
"""That a process may have open beside its leases."""

_MOST_OF_WHO = 1000  # bytes
_open: set[int] = set()  # the descriptors of this process's leases


class Claim:
    """Leases that are held; leaving the block gives them back, and so does the process's end.

    A forked child has none of them, whatever it does with its copy.

    Args:
        ends: what gives them back.
    """

    def __init__(self, ends: ExitStack) -> None:
        self._ends = ends
        self._process = os.getpid()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *error: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Give all of them back, once."""
        if os.getpid() == self._process:
            self._ends.close()


def claim_files(layout: Layout, stage: str, keys: Iterable[str]) -> Claim:
    """Take the leases of keys on this machine; arguments and errors as of `Store.claim`."""
    wanted = sorted(set(keys))  # in one order, so that of two who want the same one gets it
    disk.make_folder(layout.leases)
    _allow_files(len(wanted))
    with ExitStack() as taken:
        for key in wanted:
            path = layout.leases / key
            taken.callback(_unlock, path, _lock(path, f"{stage} {key[:12]}"))
        return Claim(taken.pop_all())


def clear(layout: Layout) -> None:
    """Delete the files that processes left which were stopped; no lease is on them."""
    for found in layout.leases.glob("*"):
        with suppress(StorageError):  # held, or no file of ours
            path = layout.leases / check_key(found.name)
            _unlock(path, _lock(path, path.name))


def _lock(path: Path, what: str) -> int:
    """Return the descriptor of a file that is locked and lies at `path`.

    Raises:
        LeaseHeldError: somebody else has locked it.
    """
    while True:
        with disk.writing(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        _open.add(handle)
        try:
            with disk.writing(path):
                _lock_now(handle, what)
                if _lies_at(path, handle):
                    os.ftruncate(handle, 0)
                    os.write(handle, this_process().encode())
                    return handle
        except BaseException:
            _close(handle)
            raise
        _close(handle)  # its last holder took the file away before it was locked


def _lock_now(handle: int, what: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(handle, _MOST_OF_WHO, 0).decode(errors="replace")
        raise LeaseHeldError(what, who or "another process") from None


def _unlock(path: Path, handle: int) -> None:
    try:
        with suppress(OSError):  # without its lock the file says nothing
            if _lies_at(path, handle):  # else the folder was deleted, and perhaps made anew
                path.unlink()
        fcntl.flock(handle, fcntl.LOCK_UN)  # a child may have the descriptor, too
    finally:
        _close(handle)


def _lies_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(handle))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _close(handle: int) -> None:
    _open.discard(handle)
    os.close(handle)


def _allow_files(count: int) -> None:
    """Raise the number of files that this process may have open, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + len(_open) + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):  # then opening says so
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _forget_in_child() -> None:
    """Close a child's copies, which would hold the leases of a parent that has died."""
    for handle in _open:
        with suppress(OSError):
            os.close(handle)
    _open.clear()


os.register_at_fork(after_in_child=_forget_in_child)
