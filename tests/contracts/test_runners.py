"""Who computes: what is refused before anything begins, and which device a process has."""

import signal
import subprocess
import sys
import threading
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
import torch
from distributed.scheduler import KilledWorker
from prefect.exceptions import CrashedRun

from compress_core.errors import ConfigError
from flows.runs.opened import _check_cluster
from flows.server import runtime
from flows.server.workers import WorkerError, Workers
from flows.settings import checks
from flows.settings.config import RunConfig
from storage.layout import Layout
from tasks.engine import own_device as devices
from tasks.engine.own_device import own_device

of_ray = pytest.importorskip("ray.exceptions", reason="the extra is not installed here")

CLUSTER = "tcp://192.0.2.1:8786"


def refusal(**values: object) -> str:
    with pytest.raises(ConfigError) as raised:
        checks.check_runner(RunConfig(**{"model": "m", "kept": 0.5, "device": "cpu"} | values))
    return str(raised.value)


@pytest.mark.parametrize("runner", sorted(checks.EXTRAS))
def test_a_runner_without_its_library(runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_runner(RunConfig(model="m", kept=0.5, device="cpu", runner=runner))
    monkeypatch.setitem(checks.EXTRAS, runner, "no_such_library")
    said = refusal(runner=runner)
    assert said == f"--runner {runner} needs no-such-library: pip install 'eigenpress[{runner}]'"


def test_a_cluster_that_cannot_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's private server is in the environment, too, when the command is opened."""
    config = RunConfig(model="m", kept=0.5, device="cpu", runner="dask", cluster=CLUSTER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "_server", None)  # of other tests
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ConfigError, match="run `eigenpress up` or set PREFECT_API_URL"):
        _check_cluster(config)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    _check_cluster(config)
    monkeypatch.setattr(runtime, "_server", object())
    with pytest.raises(ConfigError, match="that of a single command"):
        _check_cluster(config)
    _check_cluster(config.model_copy(update={"runner": "here"}))  # nothing is sent


def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask looks for it when the first task is sent."""

    class Nobody:
        def submit(self, task: object, parameters: object) -> None:
            raise OSError("timed out")

    workers = Workers("dask", 2, CLUSTER, tmp_path)
    monkeypatch.setattr(workers, "_start", Nobody)
    with pytest.raises(WorkerError, match=f"dask: {CLUSTER} does not answer .timed out"):
        workers.submit(cast(Any, None), {}, lambda result: None)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "choose_device", lambda wanted: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    checks.check_runner(RunConfig(model="m", kept=0.5, runner="processes", workers=2))
    assert "and --device auto has 2 here" in refusal(runner="processes", workers=3, device="auto")


def test_every_process_has_a_device_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claims exclude one another within a process, too."""
    monkeypatch.setattr(devices, "_CLAIMS", [])
    layout = Layout(tmp_path)
    assert [own_device("cuda", layout, 2) for _ in range(2)] == ["cuda:0", "cuda:1"]
    # all are taken: it waits for one to be given back
    assert own_device("cuda", layout, 2, lambda: devices._CLAIMS.pop(0).give_back()) == "cuda:0"
    assert [own_device(shared, layout, 0) for shared in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
    for claim in devices._CLAIMS:
        claim.give_back()


def blocked() -> set[int]:
    """The signals that this thread does not take."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


class Starts:
    """A runner that starts a process in a thread, as those of the libraries do."""

    task_run_id = uuid4()

    def submit(self, task: object, parameters: object) -> "Starts":
        words = "import signal; print(signal.SIGINT in signal.pthread_sigmask(0, ()))"

        def start() -> None:
            get_context("spawn").Semaphore()  # has what unblocks Ctrl-C where it begins
            self.said = subprocess.check_output([sys.executable, "-c", words], text=True)

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        return self

    def add_done_callback(self, then: object) -> None:
        """It never ends."""


def test_ctrl_c_is_for_the_command_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers, runner = Workers("processes", 2, None, tmp_path), Starts()
    monkeypatch.setattr(workers, "_start", lambda: runner)
    before = blocked()
    workers.submit(cast(Any, None), {}, lambda result: None)
    assert runner.said == "True\n"
    assert blocked() == before and signal.SIGINT not in before


class Ended:
    """A future of a process that came to an end, or of one that lives and refused."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        BrokenProcessPool(),
        KilledWorker("task", cast(Any, None), 0),
        of_ray.WorkerCrashedError(),
        CrashedRun(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_libraries_raise_of_a_process_that_ended(error: Exception, tmp_path: Path) -> None:
    workers = Workers("ray", 2, None, tmp_path)
    with pytest.raises(WorkerError, match="ended in the middle"):
        workers._result(Ended(error), workers)  # type: ignore[arg-type]


def test_a_process_whose_gpu_is_full_has_not_ended(tmp_path: Path) -> None:
    """Torch's error has the name of one of Ray's; its line says what to do about it."""
    assert of_ray.OutOfMemoryError.__name__ == torch.OutOfMemoryError.__name__
    workers = Workers("processes", 2, None, tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        workers._result(Ended(torch.OutOfMemoryError("full")), workers)  # type: ignore[arg-type]
    with pytest.raises(WorkerError):
        workers._result(Ended(of_ray.OutOfMemoryError("killed")), workers)  # type: ignore[arg-type]
