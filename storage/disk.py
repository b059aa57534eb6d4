"""Durable writing and checking of files, and the errors of a disk said in the store's words."""

import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import xxhash

from storage.errors import StorageError, StoreFullError, StorePermissionError

BLOCK = 1 << 20
WORKERS = 8
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)
_FULL_TEXT = os.strerror(errno.ENOSPC).lower()

T = TypeVar("T")
R = TypeVar("R")


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error means a full disk; native writers say so only in their text."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return isinstance(error, Exception) and _FULL_TEXT in str(error).lower()


def is_denied(error: OSError) -> bool:
    """Tell whether an error means that this user may not write there."""
    return error.errno in _DENIED


def full_error(what: str, folder: Path, needed: int) -> StoreFullError:
    """Return the error for a full disk.

    Args:
        what: what was being written.
        folder: a folder on that disk.
        needed: bytes known to be needed, a lower bound.
    """
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    error = StoreFullError(
        f"disk full while writing {what} in {folder}: "
        f"at least {needed:,} bytes needed, {free:,} free; "
        "nothing committed is lost; free space and run the same command again"
    )
    error.errno = errno.ENOSPC
    return error


def denied_error(path: Path, error: OSError) -> StorePermissionError:
    """Return the error for a place that this user may not write."""
    denied = StorePermissionError(
        f"cannot write {path} ({error.strerror}): "
        "choose another data directory with --home, or change its permissions"
    )
    denied.errno = error.errno
    return denied


@contextmanager
def writing(path: Path, needed: int = 1) -> Iterator[None]:
    """Say what goes wrong while `path`, or something below it, is written, in the store's words.

    Args:
        path: what is written.
        needed: bytes that it needs, a lower bound.

    Raises:
        StoreFullError: the disk is full.
        StorePermissionError: this user may not write there.
        StorageError: something else is in the way, or the disk fails.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise write_error(path, error, needed) from error
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise full_error(path.name, path.parent, needed) from error


def write_error(path: Path, error: OSError, needed: int = 1) -> StorageError:
    """Return the store's error for one of the system that came up while `path` was written."""
    if is_disk_full(error):
        return full_error(path.name, path.parent, needed)
    if is_denied(error):
        return denied_error(path, error)
    if error.errno in _IN_THE_WAY and (found := _in_the_way(path)) is not None:
        kind = "a folder" if found.is_dir() else "a file"
        wanted = "a file" if kind == "a folder" else "a folder"
        return StorageError(
            f"cannot write {path}: {found} is {kind} where {wanted} belongs; "
            "move it away and run the same command again"
        )
    return StorageError(f"cannot write {path}: {error.strerror or error}")


def _in_the_way(path: Path) -> Path | None:
    """Return the file that should be a folder, or `path` itself where it is there."""
    for above in reversed(path.parents):
        if above.exists() and not above.is_dir():
            return above
    return path if os.path.lexists(path) else None


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are absent.

    Raises:
        StorageError: see `writing`.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def checksum(path: Path) -> str:
    """Return xxh3_128 of a file's bytes, hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def each(work: Callable[[T], R], items: Iterable[T], nbytes: int | None = None) -> list[R]:
    """Apply `work` to every item in order, in threads where there is enough to wait for.

    Args:
        work: syncs or hashes one file; both free the interpreter.
        items: usually paths.
        nbytes: their size in all; None where each item waits for the disk anyway.
    """
    items = list(items)
    if len(items) < 3 or (nbytes is not None and nbytes < 8 * BLOCK):
        return [work(item) for item in items]
    return list(_pool().map(work, items))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The threads of this process; starting them per artifact would cost more than the work."""
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="storage")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def sync(paths: list[Path]) -> None:
    """Force files, or the entries of folders, to disk."""
    each(_sync_one, paths)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # says of no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` at once: readers see the old file or the new one, never a part.

    Raises:
        StorageError: see `writing`.
    """
    scratch = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    with writing(path, len(data)):
        try:
            scratch.write_bytes(data)
            _sync_one(scratch)
            os.replace(scratch, path)
        finally:
            with suppress(OSError):  # what went wrong before is what is told
                scratch.unlink()


def files_below(folder: Path) -> list[Path]:
    """List all files under `folder`, sorted.

    Raises:
        StorageError: something in it is neither a file nor a folder (a link may point elsewhere).
    """
    found: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found.extend(files_below(Path(entry.path)))
            elif entry.is_file(follow_symlinks=False):
                found.append(Path(entry.path))
            else:
                raise StorageError(
                    f"{entry.path} is neither a plain file nor a folder; copy the file instead"
                )
    return sorted(found)


def size_below(folder: Path) -> int:
    """Return the bytes held by the files under `folder`; those that vanish meanwhile count 0."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except (FileNotFoundError, NotADirectoryError):
                continue
    return total


def freed_by(paths: Iterable[Path]) -> int:
    """Return the bytes that deleting these files gives back: none of what other folders share."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError, NotADirectoryError):
            stat = os.lstat(path)
            total += stat.st_size if stat.st_nlink == 1 else 0
    return total


def remove_tree(path: Path) -> None:
    """Delete a folder or file; what resists, or is being deleted by others, is left to the next gc.

    A link is deleted, never what it leads to.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()
