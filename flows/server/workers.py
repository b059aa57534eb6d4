"""Processes that compute for this one: of its own, of Dask or of Ray, by Prefect's task runners.

They begin when something is sent for the first time, so that a run that finds everything cached has
none.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from prefect import Task
from prefect.futures import PrefectFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner

from flows.server.leash import Leash
from flows.settings.fields import Runner

AHEAD = 2  # orders per process that are sent at once: one to do, one to go on with
LOST = {
    ("concurrent", "BrokenProcessPool"),
    ("distributed", "KilledWorker"),
    ("ray", "WorkerCrashedError"),
    ("ray", "OutOfMemoryError"),  # Ray killed it; torch's of that name is raised by one that lives
    ("prefect", "CrashedRun"),
}
"""What is raised where a process ended in the middle of an order: library and name."""


class WorkerError(RuntimeError):
    """A process that computes for this one ended, or cannot be reached."""


class Workers:
    """Processes that do what they are sent.

    Args:
        kind: Whose processes they are.
        count: How many there are; of a cluster that runs already, how many are kept busy.
        cluster: Address of that cluster; None starts processes on this machine.
        home: The data directory.

    Attributes:
        at_once: Orders that are sent at a time.
    """

    def __init__(self, kind: Runner, count: int, cluster: str | None, home: Path) -> None:
        self.kind, self.count, self.cluster, self.home = kind, count, cluster, home
        self.at_once = AHEAD * count
        self._stack = ExitStack()
        self._runner: TaskRunner[Any] | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None and self.kind == "processes":
            _end_spawned()  # else what they are at would be waited for
        self._close()

    def submit(
        self,
        task: Task[..., Any],
        parameters: Mapping[str, Any],
        then: Callable[[Callable[[], Any]], None],
    ) -> UUID:
        """Sends a task.

        Args:
            task: It.
            parameters: What it is called with.
            then: Told when it has ended, with what gives its result, or raises as it did.

        Returns:
            By what Prefect knows the task's run.

        Raises:
            WorkerError: The cluster cannot be reached.
        """
        with _out_of_reach_of_ctrl_c():
            try:
                if self._runner is None:
                    self._runner = self._start()
                runner = self._runner
                with self._once():
                    future = runner.submit(task, dict(parameters))  # where Dask's is looked for
            except OSError as error:
                where = self.cluster or "this machine"
                raise WorkerError(
                    f"--runner {self.kind}: {where} does not answer ({error})"
                ) from error
        future.add_done_callback(lambda ended: then(lambda: self._result(ended, runner)))
        return UUID(str(future.task_run_id))

    def _result(self, future: PrefectFuture[Any], runner: TaskRunner[Any]) -> Any:
        """What a task came to.

        Raises:
            WorkerError: Its process ended in the middle; what is sent now goes to new ones.
        """
        try:
            return future.result()
        except Exception as error:
            kind = type(error)
            if (kind.__module__.partition(".")[0], kind.__name__) not in LOST:
                raise
            if self._runner is runner and self.kind == "processes":  # the pool ends with any
                self._close()
            raise WorkerError(
                "a process that computed ended in the middle (killed, perhaps for memory); what "
                "was finished is kept: the same command goes on from here, with fewer --workers "
                "if memory was short"
            ) from error

    def _once(self) -> AbstractContextManager[Any]:
        """Ray does not send again what it sends inside."""
        if self.kind != "ray":
            return nullcontext()
        from prefect_ray.context import remote_options

        return remote_options(max_retries=0)

    def _close(self) -> None:
        self._runner = None
        self._stack.close()

    def _start(self) -> TaskRunner[Any]:
        made = {"processes": self._processes, "dask": self._dask, "ray": self._ray}[self.kind]()
        return self._stack.enter_context(made)

    def _processes(self) -> TaskRunner[Any]:
        return ProcessPoolTaskRunner(max_workers=self.count, initializer=_begin)

    def _dask(self) -> TaskRunner[Any]:
        os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
        # What a process is killed by it may be killed by again: how often that is tried is ours.
        os.environ.setdefault("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
        from prefect_dask import DaskTaskRunner

        if self.cluster is not None:
            return DaskTaskRunner(address=self.cluster)
        here = {
            "n_workers": self.count,
            "threads_per_worker": 1,
            "host": "127.0.0.1",
            "dashboard_address": None,
            "memory_limit": 0,  # Dask's would kill who takes a share of the machine's
            "local_directory": str(self.home / "dask"),
        }
        return DaskTaskRunner(cluster_kwargs=here)

    def _ray(self) -> TaskRunner[Any]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from prefect_ray import RayTaskRunner

        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        if self.cluster is not None:
            return RayTaskRunner(address=self.cluster, init_kwargs=quiet)
        here = {"num_cpus": self.count, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        return RayTaskRunner(init_kwargs=here | quiet)


@contextmanager
def _out_of_reach_of_ctrl_c() -> Iterator[None]:
    """What is started inside, by threads that are, too, does not hear of it.

    A terminal tells all processes, and each would say where it was; this one ends the others.
    """
    resource_tracker.ensure_running()  # whoever starts it lets Ctrl-C in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """What a process of the pool does first: it ends when this one is gone."""
    Leash(os.getppid())


def _end_spawned() -> None:
    """Ends the processes of the pool."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any("multiprocessing.spawn" in word for word in child.cmdline()):
                child.kill()
