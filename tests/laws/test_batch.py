"""How many windows one forward takes, and what memory is free for them."""

from pathlib import Path

import pytest

from compress_core.batch import (
    ACCELERATOR_BYTES,
    ACCELERATOR_WINDOWS,
    CPU_BYTES,
    CPU_WINDOWS,
    FREE_SHARE,
    windows_at_once,
)
from compress_core.types import LayerRef, ModelLayout
from tasks.engine.free_memory import free_memory, free_of_groups

GIB = 1 << 30
MUCH = 1 << 40


def layout(*widths: int) -> ModelLayout:
    """One layer (n, n) per block."""
    names = tuple(f"blocks.{index}" for index in range(len(widths)))
    layers = tuple(
        LayerRef(f"{name}.layer", index, width, width, f"{name}.layer")
        for index, (name, width) in enumerate(zip(names, widths, strict=True))
    )
    return ModelLayout("A", "B", "model", names, layers, "float32", (), (), (), (), (0,))


@pytest.mark.parametrize(
    ("device", "most_bytes"), [("cpu", CPU_BYTES), ("cuda:1", ACCELERATOR_BYTES)]
)
def test_the_batch_is_the_most_that_fits(device: str, most_bytes: int) -> None:
    width = most_bytes // (4 * 2 * 3 * 64)  # three windows of 64 tokens fit

    assert windows_at_once(layout(width), 64, MUCH, device) == 3
    assert windows_at_once(layout(1, width, 1), 64, MUCH, device) == 3  # the widest block counts
    assert windows_at_once(layout(width), 3 * 64, MUCH, device) == 1
    assert windows_at_once(layout(width), 64, most_bytes * FREE_SHARE // 3 + 4096, device) == 1
    assert windows_at_once(layout(width), 64, most_bytes * FREE_SHARE, device) == 3


def test_there_is_a_batch_where_there_is_no_memory_and_a_bound_where_there_is_much() -> None:
    assert windows_at_once(layout(1 << 20), 1 << 15, 0, "cpu") == 1
    assert windows_at_once(layout(1), 1, MUCH, "cpu") == CPU_WINDOWS
    assert windows_at_once(layout(1), 1, MUCH, "cuda") == ACCELERATOR_WINDOWS


def test_some_memory_is_free_here() -> None:
    assert free_memory("cpu") > 1 << 20


def test_the_least_of_nested_limits_counts(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/outer/inner\n")
    limits = {"outer": (2 * GIB, GIB, GIB // 2), "outer/inner": (8 * GIB, GIB, 0)}
    for name, (limit, used, cache) in limits.items():
        folder = tmp_path / "groups" / name
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")

    assert free_of_groups(tmp_path, tmp_path / "groups") == [7 * GIB, 3 * GIB // 2]
    (tmp_path / "groups" / "outer" / "memory.max").write_text("max\n")
    assert free_of_groups(tmp_path, tmp_path / "groups") == [7 * GIB]


def test_limits_of_the_first_version_count(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/job\n")
    folder = tmp_path / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{GIB // 4}\n")
    (folder / "memory.stat").write_text("total_inactive_file 0\n")

    assert free_of_groups(tmp_path, tmp_path) == [3 * GIB // 4]
    assert free_of_groups(tmp_path / "nothing", tmp_path) == []
