"""Prefect's known traps do not reach the user: tests run whole processes and read the database."""

import ast
import http.server
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from flows.server import runtime
from tests.patience import PATIENCE, wait_for
from tests.pipeline import pico

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import time
from pathlib import Path

from flows.server import runtime

home, tasks, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
assert "prefect" not in sys.modules
runtime.prepare_environment(home)
runtime.start_early()
assert "prefect" not in sys.modules

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed


@task(cache_policy=NO_CACHE, persist_result=False)
def unit(number):
    if mode == "fail" and number == tasks - 1:
        raise ValueError("planted")
    if mode == "alone" and number == 0:
        runtime._server.process.kill()
        runtime._server.process.wait()
    return Completed(name="Cached", data=number) if number % 2 else number


@flow
def main():
    return sum([future.result() for future in [unit.submit(n) for n in range(tasks)]])


runtime.ready()
try:
    with runtime.flow_settings():
        total = main()
except ValueError:
    total = "failed"
except runtime.ServerError as error:
    total = error
print(f"total {total}", flush=True)
if mode == "wait":
    from prefect.events.worker import EventsWorker

    EventsWorker.instance().wait_until_empty()
    print(runtime._server.process.pid, flush=True)
    time.sleep(60)
"""


def clean_environment() -> dict[str, str]:
    named = ("PREFECT_", "MLFLOW_", "NO_PROXY", "no_proxy")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(named)}
    return kept | {"PYTHONPATH": str(ROOT)}


def start(home: Path, tasks: int, mode: str = "", **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(home), str(tasks), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home.parent,
        env=clean_environment() | more,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out, err


def states(home: Path, table: str) -> Counter[str]:
    with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as database:
        return Counter(name for (name,) in database.execute(f"SELECT state_name FROM {table}"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory that a process left in the middle of its server's first migration.

    The next two processes found it so, both at once; one is long.
    """
    home = tmp_path_factory.mktemp("runtime") / "home"
    kill_in_a_migration(home)
    numbers = (10, 250)
    for number, process in [(number, start(home, number)) for number in numbers]:
        assert finish(process) == (f"total {sum(range(number))}\n", "")
    return home


def kill_in_a_migration(home: Path) -> None:
    """Its server may not wait for the end of its start, most of a minute on a busy machine."""
    script = (
        "import sys, time; from pathlib import Path; from flows.server import runtime\n"
        "runtime.prepare_environment(Path(sys.argv[1])); runtime.start_early()\n"
        "print(runtime._server.process.pid, flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(home)],
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    database = home / "prefect" / "prefect.db"
    while not (database.exists() and database.stat().st_size):
        assert Path(f"/proc/{child}").exists()
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not Path(f"/proc/{child}").exists())


def test_behind_one_killed_in_a_migration_two_processes_record_every_task_of_a_long_burst(
    home: Path,
) -> None:
    """On a home that is wholly fresh, with all of a run: test_processes."""
    assert states(home, "task_run") == {"Completed": 5 + 125, "Cached": 5 + 125}
    assert states(home, "flow_run") == {"Completed": 2}


def test_kill_leaves_a_record_and_no_orphan_and_the_next_start_records_its_failure(
    home: Path,
) -> None:
    before = states(home, "task_run")
    process = start(home, 20, "wait")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "total 190\n"
    child = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    wait_for(lambda: not Path(f"/proc/{child}").exists())
    assert states(home, "task_run") - before == {"Completed": 10, "Cached": 10}
    tasks, flows = states(home, "task_run"), states(home, "flow_run")
    out, err = finish(start(home, 5, "fail"))
    assert out == "total failed\n"
    assert "ValueError: planted" in err
    assert states(home, "task_run") - tasks == {"Completed": 2, "Cached": 2, "Failed": 1}
    assert states(home, "flow_run") - flows == {"Failed": 1}


def test_a_server_that_ends_in_the_middle_is_told_of_once_and_not_waited_for(home: Path) -> None:
    out, err = finish(start(home, 40, "alone", PREFECT_CLIENT_MAX_RETRIES="0"))
    assert "failed in the middle of the run (it ended: it said nothing); everything" in out
    assert "EventsWorker" not in out + err  # an event takes ten seconds to be given up


def test_the_environment_of_the_user_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in runtime.DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", "/theirs")
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    runtime.prepare_environment(tmp_path)
    assert os.environ["PREFECT_HOME"] == "/theirs"
    assert os.environ["PREFECT_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["DO_NOT_TRACK"] == "1"


SECRET = "sesame-opens"
DEAD = f"http://user:{SECRET}@127.0.0.1:9/api"
PROXY = f"http://user:{SECRET}@127.0.0.1:9"


def refusal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What is said of a server named in the environment, in this process."""
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name.startswith("PREFECT_API"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime, "_server", None)
    monkeypatch.setattr(runtime, "_foreign", None)
    runtime._reload_settings()
    try:
        with pytest.raises(runtime.ServerError) as caught:
            runtime.ready()
    finally:
        monkeypatch.undo()
        runtime._reload_settings()
    line = str(caught.value)
    assert "\n" not in line and SECRET not in line
    return line


@pytest.mark.parametrize(
    "proxies",
    [
        {},
        {"NO_PROXY": "example.com"},
        {"no_proxy": "*"},
        {"HTTP_PROXY": PROXY, "NO_PROXY": "127.0.0.1"},
        {"http_proxy": PROXY},
        {"ALL_PROXY": PROXY},
        {"HTTPS_PROXY": PROXY},
        {"all_proxy": PROXY.replace("http", "socks5")},
        {"HTTP_PROXY": PROXY.replace("http", "foo")},
    ],
)
def test_no_word_about_proxies_switches_off_the_check_of_a_named_server(
    proxies: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refusal(monkeypatch, PREFECT_API_URL=DEAD, **proxies)
    assert line.startswith("no Prefect server answers at PREFECT_API_URL=http://***@127.0.0.1:9/a")


@pytest.mark.parametrize("url", ["foo", f"ftp://u:{SECRET}@h/api", f"http://u:{SECRET}@/api"])
def test_an_address_that_is_none_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no Prefect server answers at" in refusal(monkeypatch, PREFECT_API_URL=url)


def test_a_server_that_wants_another_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_error(401)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        line = refusal(monkeypatch, PREFECT_API_URL=url, PREFECT_API_KEY=SECRET)
        server.shutdown()
    assert "401" in line
    assert f"Bearer {SECRET}" in seen


def test_what_goes_around_the_proxy_keeps_going_around_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of NO_PROXY and no_proxy libraries read one; the private server is added to both."""
    with pico.environment(clean_environment() | {"NO_PROXY": "example.com"}):
        monkeypatch.setattr(runtime, "_server", None)
        monkeypatch.setattr(runtime, "_foreign", None)
        runtime.prepare_environment(tmp_path)
        runtime.start_early()
        assert urllib.request.proxy_bypass("example.com")
        assert urllib.request.proxy_bypass("127.0.0.1")
        runtime.stop()


@pytest.mark.parametrize(
    ("file", "text"), [("prefect.toml", '[api]\nurl = "http://127.0.0.1:9/api"\n')]
)
def test_a_server_named_in_a_file_is_checked_too(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    script = (
        "import sys; from pathlib import Path; from flows.server import runtime\n"
        "runtime.prepare_environment(Path(sys.argv[1]))\n"
        "try:\n    runtime.ready()\n"
        "except runtime.ServerError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "home")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean_environment(),
        timeout=PATIENCE,
    )
    assert done.stderr == ""
    assert "no Prefect server answers at PREFECT_API_URL=http://127.0.0.1:9/api" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "home" / "prefect").mkdir(parents=True)
    (tmp_path / "home" / "prefect" / "prefect.db").write_bytes(b"this is no database" * 100)
    quiet = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}  # as the commands have it
    process = start(tmp_path / "home", 1, **quiet)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "ServerError: the private Prefect server ended before it answered" in err
    assert "file is not a database" in err.splitlines()[-1]


def test_deployments_name_flows_that_exist_and_hold_no_lease() -> None:
    text = (ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8")
    deployments = yaml.safe_load(text)["deployments"]
    names = ["run", "sweep", "promote", "clean"]
    assert [deployment["name"] for deployment in deployments] == names
    for deployment in deployments:
        file, _, function = deployment["entrypoint"].partition(":")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert "concurrency_limit" not in deployment  # a run that loses its lease is ended
