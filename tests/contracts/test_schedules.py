"""What `up` and `deploy` refuse, who finds their server, and what a scheduled run says."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows.server.children import LEASHED, adopting_orphans, end_orphans, start_child
from flows.server.running import announce, only_one, running_server
from tests.patience import PATIENCE
from tests.pipeline import pico

Refuse = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "nightly.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "kept": 0.6, "calibration": "c.txt"}))
    return file


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cron", "0 2 * *"], "--cron '0 2 * *' is no schedule"),
        (["--cron", "0 2 * * *", "--timezone", "Mars"], "--timezone 'Mars' is no time zone"),
        (["--cron", "0 2 * * *", "--every", "6h"], "give one of them"),
        (["--every", "5"], "--every '5' is no time of at least 30 seconds"),
        (["--every", "5s"], "--every '5s' is no time of at least 30 seconds"),
        (["--timezone", "UTC"], "--timezone is that of --cron"),
        (["--name", "a/b"], "--name 'a/b' is no name of a deployment"),
        (["--notify", "sesame-opens"], "--notify is no address"),
        ([], "there is no Prefect server to deploy to: start `eigenpress up`"),
    ],
)
def test_a_deployment_that_cannot_be_is_refused_in_a_line(
    flags: list[str], words: str, config: Path, refuse: Refuse
) -> None:
    line = refuse("deploy", config, "--home", "home", *flags)
    assert words in line and "sesame-opens" not in line


@pytest.mark.parametrize("flag", ["--prefect-port", "--mlflow-port"])
def test_a_port_that_is_taken_is_one_line(flag: str, refuse: Refuse) -> None:
    other = {"--prefect-port": "--mlflow-port", "--mlflow-port": "--prefect-port"}[flag]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refuse("up", "--home", "home", flag, port, other, 0)
    assert line.startswith(f"{flag} {port}: Address already in use; ")


def test_what_else_this_process_has_started_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with adopting_orphans() as others:
            end_orphans([], others)
        assert other.poll() is None
        other.kill()


def test_a_second_up_on_a_home_is_refused_and_says_where_the_first_is(
    tmp_path: Path, refuse: Refuse
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with only_one(home):
        assert running_server(home) is None  # it does not answer yet
        announce(home, {"api": "http://127.0.0.1:9/api"})
        assert running_server(home) == "http://127.0.0.1:9/api"
        line = refuse("up", "--home", home, "--prefect-port", 0, "--mlflow-port", 0)
    assert "runs already for" in line and f"(process {os.getpid()})" in line
    assert running_server(home) is None


def test_what_a_killed_up_leaves_is_not_believed(tmp_path: Path) -> None:
    with only_one(tmp_path):
        announce(tmp_path, {"api": "http://127.0.0.1:9/api"})
        left = (tmp_path / "up.json").read_bytes()
    (tmp_path / "up.json").write_bytes(left)
    assert running_server(tmp_path) is None


SLEEPER = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                       start_new_session=True).pid, flush=True)
time.sleep(600)
"""
PARENT = """
import os, sys, time
from pathlib import Path
from flows.server.children import LEASHED, adopting_orphans, end_orphans, start_child
start_child("it", [LEASHED, "sleeper"], Path(sys.argv[1]), dict(os.environ))
time.sleep(600)
"""


def grandchild(log: Path) -> psutil.Process:
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
    return psutil.Process(int(log.read_text().split()[0]))


@pytest.mark.parametrize("how", ["ended", "parent killed"])
def test_a_child_ends_with_all_that_it_started(how: str, tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    path = os.pathsep.join([str(pico.ROOT), str(tmp_path)])
    environment, log = pico.clean_environment(PYTHONPATH=path), tmp_path / "log"
    if how == "ended":
        child = start_child("it", [LEASHED, "sleeper"], log, environment)
        below = grandchild(log)
        child.end(10)
        assert child.process.returncode == -signal.SIGTERM
    else:
        words = [sys.executable, "-c", PARENT, str(log)]
        with subprocess.Popen(words, env=environment) as parent:
            below = grandchild(log)
            parent.kill()
    assert psutil.wait_procs([below], timeout=PATIENCE)[1] == []


def run_of(version: int, states: list[str], **more: Any) -> dict[str, Any]:
    stages = [{"name": "collect", "state": state} for state in states]
    return {"stages": stages, "registered": {"name": "m", "version": version, **more}}


def test_a_scheduled_run_says_in_a_line_what_came_of_it() -> None:
    from flows.runs.execute import outcome_of

    same = run_of(3, ["cached", "cached"], unchanged=True)
    assert outcome_of([same]) == "nothing changed: all 2 units cached, still m version 3"
    new = run_of(4, ["cached", "computed"])
    assert outcome_of([same, new]) == "1 units computed, 3 cached; new: m version 4"
    again = run_of(3, ["computed", "cached"], unchanged=True)
    assert outcome_of([again]) == "nothing changed: 1 units made again, still m version 3"
