"""Which machine this is, and which of its processes are there."""

import os
import socket
from contextlib import suppress
from pathlib import Path


def this_host() -> str:
    """The machine, which start of it, and the space that process ids are counted in."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def this_process() -> str:
    """This process, for people."""
    return f"process {os.getpid()} of {socket.gethostname()}"


def runs(pid: int) -> bool:
    """Whether a process of this machine is there; a number that no process can have is none."""
    if pid <= 0:  # a group of processes to the system
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # someone else's, so it runs
        return True
    return True
