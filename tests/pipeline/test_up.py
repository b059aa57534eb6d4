"""`eigenpress up` as people run it: a schedule fires, dead runs free their slot, all of it ends."""

import http.server
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient

from flows.server.pool import WORKER_LABEL
from flows.server.running import running_server
from tests.patience import PATIENCE, wait_for
from tests.pipeline import pico


class Up:
    """A running `eigenpress up`."""

    def __init__(self, process: subprocess.Popen[str], home: Path, told: list[Any]) -> None:
        self.process, self.home, self.told = process, home, told
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()[1]
        self.said = json.loads("".join(lines))

    @contextmanager
    def environment(self) -> Iterator[None]:
        """This process's, as one in which PREFECT_API_URL names the server."""
        from prefect.settings import PREFECT_API_URL, temporary_settings

        url = self.said["api"]
        with (
            pico.environment(pico.clean_environment(PREFECT_API_URL=url)),
            temporary_settings({PREFECT_API_URL: url}),
        ):
            yield

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        from prefect.client.orchestration import get_client

        with self.environment(), get_client(sync_client=True) as client:
            yield client


@pytest.fixture(scope="module")
def hook() -> Iterator[tuple[str, list[Any]]]:
    """An address that takes POSTs, and what came."""
    told: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/?token=sesame-opens", told
        server.shutdown()


@pytest.fixture(scope="module")
def up(cold_home: Path, prepared_home: Path, hook: tuple[str, list[Any]]) -> Iterator[Up]:
    shutil.copytree(prepared_home / "prefect", cold_home / "prefect", dirs_exist_ok=True)
    words = pico.arguments("up", {"prefect_port": 0, "mlflow_port": 0, "home": cold_home})
    process = pico.start([*words, "--json"], cold_home, PREFECT_LOGGING_SERVER_LEVEL="ERROR")
    try:
        yield Up(process, cold_home, hook[1])
    finally:
        process.terminate()
        process.wait(PATIENCE)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def deploy(up: Up, inputs: pico.Inputs, *, name: str, **options: Any) -> dict[str, Any]:
    """Deploys the run of `cold`, as the command does; what it prints."""
    from flows.commands.deploy import deploy_config
    from flows.server.deploying import When
    from flows.settings.config import RunConfig

    printed: list[Any] = []
    settings = RunConfig(**inputs.settings(up.home))
    when, notify = When(every=options.get("every")), options.get("notify")
    with up.environment():
        deploy_config(settings, name, when, notify, True, printed.append)
    return dict(printed[0])


def test_pages_answer_and_commands_on_the_home_find_the_server(up: Up) -> None:
    assert running_server(up.home) == up.said["api"] == f"{up.said['prefect']}/api"
    for name in ("prefect", "mlflow"):
        with urlopen(up.said[name], timeout=PATIENCE) as page:
            assert page.status == 200 and b"<html" in page.read().lower()


def test_a_schedule_fires_and_a_run_that_finds_nothing_changed_says_so(
    up: Up, inputs: pico.Inputs, cold: dict[str, Any]
) -> None:
    """That a schedule fires at all is what SQLAlchemy 2.1 ends without a word."""
    made = deploy(up, inputs, name="nightly", every="30s")
    assert made["deployment"] == "eigenpress run/nightly"
    with up.client() as client:

        def ended() -> Any:
            return [run for run in client.read_flow_runs() if run.state and run.state.is_final()]

        first = wait_for(ended, every=2)[0]
        client.pause_deployment(made["id"])
        deployment = client.read_deployment(made["id"])
    # a limit at the server is a lease, and Prefect ends a run that loses it
    assert deployment.global_concurrency_limit is None
    units = len(cold["stages"]) - 1
    assert first.auto_scheduled and first.state.name == "Completed"
    said = first.state.message.rpartition(" ")[0]  # other tests register the same model again
    assert said == f"nothing changed: all {units} units cached, still pico version"


def test_a_run_whose_worker_was_killed_before_it_ran_frees_its_slot_and_is_told_of(
    up: Up, inputs: pico.Inputs, hook: tuple[str, list[Any]]
) -> None:
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.states import Pending, Scheduled

    from flows.server.pool import POOL, end_dead_runs, worker_name

    made = deploy(up, inputs, name="limited", notify=hook[0])
    with up.client() as client:
        client.update_deployment(made["id"], DeploymentUpdate(concurrency_limit=1))
        (alive,) = [w.name for w in client.read_workers_for_work_pool(POOL)]
        gone = worker_name().rpartition("-")[0] + "-1"  # of a process that began at another time
        later: Any = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(days=1))

        def take(worker: str) -> tuple[Any, str | None]:
            run = client.create_flow_run_from_deployment(made["id"], state=later)
            client.update_flow_run_labels(run.id, {WORKER_LABEL: worker})
            client.set_flow_run_state(run.id, Pending())
            return run.id, client.read_flow_run(run.id).state_name

        killed, state = take(gone)
        assert state == "Pending"
        assert take(alive)[1] == "AwaitingConcurrencySlot"
        leases = up.home / "prefect" / "concurrency_leases"
        assert list(leases.glob("????????-*.json"))  # outlives the server
        (line,) = end_dead_runs(client)
        assert f"the worker {gone} ended before this run did" in line
        assert client.read_flow_run(killed).state_name == "Crashed"
        assert take(alive)[1] == "Pending"
        assert end_dead_runs(client) == []
        kind, told = wait_for(lambda: up.told)[0]
    assert kind == "application/json"
    assert (told["deployment"], told["state"]) == ("limited", "Crashed")
    assert told["message"] in told["text"] and gone in told["message"]
    assert told["address"].startswith(up.said["prefect"])


def test_killed_it_leaves_no_process_and_is_not_believed_any_more(up: Up) -> None:
    family = psutil.Process(up.process.pid).children(recursive=True)
    assert len(family) >= 3
    os.kill(up.process.pid, signal.SIGKILL)
    up.process.wait()
    _, left = psutil.wait_procs(family, timeout=PATIENCE)
    assert left == []
    assert (up.home / "up.json").exists()
    assert running_server(up.home) is None
