"""A stored file elsewhere: as a copy of its own, or as a second name of the same file."""

import errno
import os
import shutil
from pathlib import Path

from storage.errors import StorageError

_PIECE = 1 << 30
# The kernel or the file system has no such call, or not between these two places.
_CANNOT = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ETXTBSY)


def copy(source: Path, target: Path) -> None:
    """Copy the bytes of a file; where the file system has reflinks (btrfs, xfs) none is moved.

    Raises:
        OSError: `target` is there, or cannot be written whole.
    """
    with source.open("rb") as old, target.open("xb") as new:
        size = os.fstat(old.fileno()).st_size
        if not _in_kernel(old.fileno(), new.fileno(), size):
            new.truncate()
            shutil.copyfileobj(old, new, 1 << 20)


def _in_kernel(old: int, new: int, size: int) -> bool:
    """Have the file system share the blocks, or the kernel copy them; False if neither can."""
    done = 0
    try:
        while done < size:
            count = os.copy_file_range(old, new, min(_PIECE, size - done), done, done)
            if not count:
                return False
            done += count
    except AttributeError:  # not Linux
        return False
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    return True


def share(source: Path, target: Path) -> None:
    """Give a file a second name and make it read-only: written at one place it changes at both.

    Raises:
        StorageError: the two places are not on one file system with hard links.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        raise StorageError(
            f"cannot link {target.parent} to the store ({error.strerror}): "
            "leave --link out, or choose a folder on the data directory's disk"
        ) from error
    os.chmod(target, 0o444)
