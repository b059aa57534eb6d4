"""Whether a process of this machine is there."""

import os
import subprocess
import sys

import pytest

from storage.hosts import runs, this_host


def test_this_process_runs_and_one_that_has_ended_does_not() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        pass
    assert runs(os.getpid()) and runs(os.getppid())
    assert not runs(ended.pid)


@pytest.mark.parametrize("number", [0, -1, 10**30])
def test_a_number_that_no_process_can_have_is_none(number: int) -> None:
    assert not runs(number)


def test_the_host_is_the_same_for_all_its_processes() -> None:
    script = "from storage.hosts import this_host; print(this_host())"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert said.stdout.strip() == this_host()
