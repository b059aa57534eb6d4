"""How many threads a product is divided among, and how they wait for one another.

Both are read from the environment when torch's OpenMP library is loaded, so they have to be there
before torch is imported. What the user has in the environment stays.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

# A thread that spins while it waits keeps another program's thread, or a sibling with work to do,
# off its core: on a busy machine that costs ten times the seconds. docs/benchmarks.md has figures.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
WAITING = (*PASSIVE, "GOMP_SPINCOUNT", "KMP_LIBRARY")  # any of these says how the user wants it
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def prepare_threads() -> None:
    """Sets this process's environment by :func:`thread_settings`, before torch is imported."""
    os.environ.update(thread_settings(os.environ, affinity(), cpu_quota()))


def thread_settings(
    environment: Mapping[str, str], there: int, quota: float | None
) -> dict[str, str]:
    """What is to be added to an environment.

    Args:
        environment: What is there.
        there: Cores that the process may run on.
        quota: Cores' worth of time that it may take; None where there is no limit.

    Returns:
        Variables that are not in ``environment``. Without a quota below ``there`` no count is
        among them: OpenMP and MKL count the cores of the affinity, MKL without hyperthreads.
    """
    added = {} if any(name in environment for name in WAITING) else dict(PASSIVE)
    if quota is not None and quota < there and not any(name in environment for name in COUNTS):
        added["OMP_NUM_THREADS"] = str(cores(there, quota))
    return added


def cores(there: int, quota: float | None) -> int:
    """Cores that a process may keep busy.

    Args:
        there: Cores that it may run on.
        quota: Cores' worth of time that it may take; None where there is no limit.
    """
    return there if quota is None else min(there, max(1, math.ceil(quota)))


def affinity() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # no such thing on macOS


def cpu_quota(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Cores' worth of time that control groups, version 1 or 2, leave this process.

    Args:
        groups: The file that says which groups the process is in.
        mount: Where their files are.

    Returns:
        The tightest limit of its group and the groups around it; None without one.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None  # not Linux
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += [_limit_v2(folder) for folder in _around(mount, path)]
        elif "cpu" in controllers.split(","):
            for root in (mount / "cpu", mount / controllers):
                limits += [_limit_v1(folder) for folder in _around(root, path)]
    return min((limit for limit in limits if limit is not None), default=None)


def _around(root: Path, path: str) -> Iterator[Path]:
    """A group's folder and those of all groups around it; a container may see only the root's."""
    folder = Path(path.lstrip("/"))
    yield from (root / inside for inside in (folder, *folder.parents))


def _limit_v2(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()
    return None if len(words) != 2 or words[0] == "max" else int(words[0]) / int(words[1])


def _limit_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return None if not quota or not period or int(quota) < 0 else int(quota) / int(period)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
