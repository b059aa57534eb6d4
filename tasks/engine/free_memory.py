"""How much memory this process may still take."""

import os
from pathlib import Path

import torch

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory(device: str) -> int:
    """Bytes that are free on a device, as far as the process's limits allow it to take them."""
    if device.partition(":")[0] == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_free_of_machine(PROC), *free_of_groups(PROC, GROUPS)])


def _free_of_machine(proc: Path) -> int:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    found = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return int(found["MemAvailable"].split()[0]) * 1024


def free_of_groups(proc: Path, groups: Path) -> list[int]:
    """Bytes left under each memory limit of the process's control groups, of either version.

    Args:
        proc: Where the kernel describes processes.
        groups: Where control groups are mounted.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = groups / "memory" if kinds else groups
        names = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
        own = root / path.strip("/")
        for folder in [own, *own.parents]:  # in a container the outer ones are not to be seen
            if folder.is_relative_to(root):
                found += _left(folder, *names)
    return found


def _left(folder: Path, limit_name: str, used_name: str) -> list[int]:
    """Bytes left in one group, in a list; none where it has no limit."""
    try:
        limit = (folder / f"memory.{limit_name}").read_text().strip()
        used = int((folder / f"memory.{used_name}").read_text())
        stat = (folder / "memory.stat").read_text().split()
    except OSError:
        return []
    if limit == "max":
        return []
    pairs: dict[str, str] = dict(zip(stat[::2], stat[1::2], strict=True))
    reclaimable = int(pairs.get("total_inactive_file", pairs.get("inactive_file", "0")))
    return [max(0, int(limit) - used + reclaimable)]
