"""How threads wait and how many there are, from made-up environments and control groups."""

import subprocess
import sys
from pathlib import Path

import pytest

from flows.settings.threads import PASSIVE, WAITING, cpu_quota, thread_settings


def groups(tmp_path: Path, line: str, files: dict[str, str]) -> float | None:
    (tmp_path / "cgroup").write_text(line + "\n")
    for name, text in files.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return cpu_quota(tmp_path / "cgroup", tmp_path / "mount")


@pytest.mark.parametrize(
    ("line", "files", "quota"),
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/not/seen/inside", {"cpu.max": "300000 100000"}, 3.0),
        ("0::/a", {}, None),
        (
            "4:cpu,cpuacct:/job",
            {"cpu/job/cpu.cfs_quota_us": "250000", "cpu/job/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        (
            "4:cpu,cpuacct:/job",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "250000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        (
            "4:cpu:/job",
            {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"},
            None,
        ),
        (
            "4:cpuset:/job",
            {"cpu/job/cpu.cfs_quota_us": "100", "cpu/job/cpu.cfs_period_us": "100"},
            None,
        ),
    ],
)
def test_the_quota_is_the_tightest_of_the_groups_around_a_process(
    tmp_path: Path, line: str, files: dict[str, str], quota: float | None
) -> None:
    assert groups(tmp_path, line, files) == quota


def test_there_is_no_quota_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "missing", tmp_path) is None


@pytest.mark.parametrize(
    ("cores", "quota", "threads"),
    [
        (8, None, None),
        (8, 8.0, None),
        (2, 16.0, None),
        (64, 4.0, "4"),
        (8, 1.5, "2"),
        (8, 0.2, "1"),
    ],
)
def test_threads_are_counted_only_where_a_quota_is_below_the_cores(
    cores: int, quota: float | None, threads: str | None
) -> None:
    assert thread_settings({}, cores, quota).get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_count_that_the_user_gave_stays(name: str) -> None:
    assert thread_settings({name: "3"}, 64, 4.0) == PASSIVE


@pytest.mark.parametrize("name", WAITING)
def test_a_way_of_waiting_that_the_user_gave_stays(name: str) -> None:
    assert thread_settings({name: "x"}, 8, None) == {}


def test_the_command_line_brings_no_torch_before_it_has_set_how_threads_wait() -> None:
    code = (
        "import sys; import flows.commands.cli as cli; "
        "before = 'torch' in sys.modules; sys.argv = ['eigenpress', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "import os; sys.exit(before or os.environ['OMP_WAIT_POLICY'] != 'PASSIVE')"
    )
    # The environment is bare so that nothing in it answers.
    bare = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True).returncode == 0
    )
