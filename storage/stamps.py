"""How a file is known without being read, and where that can be relied on.

Size, modification time and inode can be set by whoever unpacks an archive. The change time cannot:
the kernel sets it whenever bytes, times, links or rights of a file change. But not every file
system keeps one, and an image that is mounted in place of another brings its own.
"""

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
# Local disks, whose change times come from this machine's kernel and move with memory maps, too.
# In memory (tmpfs) those of maps do not move; images (squashfs, iso9660) and what is laid over
# them (overlay) hold times that their maker chose; servers (nfs, fuse) answer from their caches.
TRUSTED = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "jfs"))
_ESCAPE = re.compile(rb"\\([0-7]{3})")  # of blanks in mount points


def file_stamp(path: Path) -> list[int]:
    """Return size, modification and change time, inode, device and file system of a file."""
    stat, system = os.stat(path), os.statvfs(path)
    return [
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
        stat.st_ino,
        stat.st_dev,
        system.f_fsid,
    ]


def tells_changes(path: Path) -> bool:
    """Tell whether a file's stamp is sure to differ once its bytes do.

    Args:
        path: a real path, without links in it.

    Returns:
        False for what is mounted to be read only: all of it may be exchanged at once.
    """
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return False
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:  # not Linux: no mount points to look at, and change times as POSIX has them
        return True
    return _kind_of(os.fsencode(path), lines) in TRUSTED


def _kind_of(path: bytes, lines: list[bytes]) -> str:
    """Return the file system's kind at `path`: of the last of the longest mount points above it."""
    best, kind = -1, b""
    for line in lines:
        before, _, after = line.partition(b" - ")
        point = _ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), before.split(b" ")[4])
        inside = point in (b"/", path) or path.startswith(point + b"/")
        if inside and len(point) >= best:
            best, kind = len(point), after.split(b" ")[0]
    return kind.decode()
