"""`eigenpress up`: Prefect's server, a worker and MLflow's pages, started and ended together."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from compress_core.secrets import hide
from flows.server import runtime
from flows.server.children import (
    LEASHED,
    SCRIPTS,
    Child,
    adopting_orphans,
    bind,
    end_orphans,
    start_child,
)
from flows.server.pool import KIND, POOL, end_dead_runs, is_online, make_pool, worker_name
from flows.server.running import announce, only_one
from flows.server.runtime import ServerError
from storage.disk import make_folder

if TYPE_CHECKING:
    import psutil
    from prefect.client.orchestration import SyncPrefectClient

SERVER, WORKER = "Prefect's server", "the worker"
LOOK_SECONDS = 0.2  # between looks at the children
DEAD_SECONDS = 60  # between looks for runs whose worker is gone
POLL_SECONDS = 5  # between the worker's looks for a run; Prefect's own are 15
WORKER_SECONDS = 10  # that the worker has to report how its run ended
SERVER_SECONDS = 15


class Together:
    """Servers and worker of one data directory.

    Args:
        home: The data directory, there already.
        prefect_port: For Prefect's server; 0 takes any. With PREFECT_API_URL set none is started,
            and the worker is that server's.
        mlflow_port: For MLflow's pages; 0 takes any.
        mlflow: Says what serves MLflow's pages, a module with arguments and its environment;
            None where nothing has to.
        say: Tells people.

    Attributes:
        addresses: Name to address, once all answer.
    """

    def __init__(
        self,
        home: Path,
        prefect_port: int,
        mlflow_port: int,
        mlflow: Callable[[], tuple[list[str], dict[str, str]] | None],
        say: Callable[[str], None],
    ) -> None:
        self.home, self.say = home, say
        self.ports = (prefect_port, mlflow_port)
        self.mlflow = mlflow
        self.children: list[Child] = []
        self.others: set[psutil.Process] = set()  # of who runs this
        self.worker = worker_name()
        self.level = os.environ.get(
            "PREFECT_LOGGING_LEVEL", "INFO"
        )  # what our commands set is less
        self.addresses: dict[str, str] = {}
        self.logs = home / "logs"

    @contextmanager
    def running(self) -> Iterator[dict[str, str]]:
        """Everything answers inside, and has ended behind it; a second Ctrl-C hurries nothing.

        Raises:
            ConfigError: A port is taken, or another `up` runs on the data directory.
            ServerError: Something ended before it answered.
        """
        with ExitStack() as stack:
            stack.enter_context(only_one(self.home))
            make_folder(self.logs)
            runtime.prepare_environment(self.home)
            stack.enter_context(_ended_by_signals())
            self.others = stack.enter_context(adopting_orphans())
            stack.callback(self._end)
            self._start()
            announce(self.home, self.addresses)
            yield self.addresses

    def watch(self) -> None:
        """Looks after the children until one ends.

        Raises:
            ServerError: One has ended; the others then end, too.
        """
        looked = time.monotonic()
        while True:
            time.sleep(LOOK_SECONDS)
            self._all_live()
            if time.monotonic() - looked > DEAD_SECONDS:
                self._end_dead_runs()
                looked = time.monotonic()

    def _start(self) -> None:
        environment = {
            **os.environ,
            "PREFECT_LOGGING_LEVEL": self.level,
            "PYTHONUNBUFFERED": "1",
        }
        foreign = os.environ.get("PREFECT_API_URL")
        with ExitStack() as listening:
            prefect = None
            if not foreign:
                prefect = listening.enter_context(bind(self.ports[0], "--prefect-port"))
            place = listening.enter_context(bind(self.ports[1], "--mlflow-port"))
            port = place.getsockname()[1]  # MLflow binds it itself, and the place is given up
            if prefect is not None:
                self._start_prefect(prefect.fileno(), prefect.getsockname()[1], environment)
        if (pages := self.mlflow()) is not None:
            words, own = pages
            words = [LEASHED, *words, "--port", str(port)]
            self._child("MLflow", words, "mlflow.log", own | environment)
            self.addresses["mlflow"] = f"http://127.0.0.1:{port}"
        if foreign:
            self.addresses["api"] = foreign
            runtime.start_early()
            runtime.ready()
        else:
            self._answers(self.addresses["prefect"], "/api/health")
        with _client() as client:
            make_pool(client)
            self._end_dead_runs()
            self._start_worker(environment)
            if "mlflow" in self.addresses:
                self._answers(self.addresses["mlflow"], "/health")
            while not is_online(client, self.worker):
                self._all_live()
                time.sleep(LOOK_SECONDS)

    def _start_prefect(self, listener: int, port: int, environment: dict[str, str]) -> None:
        address = f"http://127.0.0.1:{port}"
        os.environ["PREFECT_API_URL"] = environment["PREFECT_API_URL"] = f"{address}/api"
        runtime.go_around_proxies()
        own = {
            "PREFECT_UI_API_URL": f"{address}/api",
            # Else it is copied into the package, which need not be writable.
            "PREFECT_UI_STATIC_DIRECTORY": str(Path(os.environ["PREFECT_HOME"], "ui")),
        }
        script = str(SCRIPTS / "private.py")
        log = self.logs / "prefect.log"
        child = start_child(SERVER, [script, "lasting"], log, own | environment, listener)
        self.children.append(child)
        self.addresses |= {"prefect": address, "api": f"{address}/api"}

    def _start_worker(self, environment: dict[str, str]) -> None:
        """One run at a time, by the worker itself, which leaves nothing behind when it is killed.

        A limit at the server is a lease that the run renews every four minutes. Where that fails
        Prefect ends the run, whatever it has done.
        """
        own = {"PREFECT_WORKER_QUERY_SECONDS": str(POLL_SECONDS)}
        words = [LEASHED, "prefect", "worker", "start", "--pool", POOL, "--type", KIND]
        words += ["--limit", "1", "--name", self.worker]
        self._child(WORKER, words, "worker.log", own | environment)

    def _child(self, name: str, words: list[str], log: str, environment: dict[str, str]) -> None:
        self.children.append(start_child(name, words, self.logs / log, environment))

    def _all_live(self) -> None:
        for child in self.children:
            if child.process.poll() is not None:
                raise ServerError(child.complaint)

    def _answers(self, address: str, path: str) -> None:
        """Waits until a server says that it is well, or ends."""
        while True:
            self._all_live()
            connection = HTTPConnection(address.removeprefix("http://"), timeout=SERVER_SECONDS)
            with suppress(OSError, HTTPException):
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return
            connection.close()
            time.sleep(LOOK_SECONDS)

    def _end_dead_runs(self, ended: str | None = None) -> None:
        """Says which runs are dead; a server that does not answer now is asked again later."""
        try:
            with _client() as client:
                lines = end_dead_runs(client, ended)
        except Exception as error:  # of httpx and Prefect, each their own
            lines = [f"runs whose worker is gone: not looked for ({hide(str(error))})"]
        for line in lines:
            self.say(line)

    def _end(self) -> None:
        """Ends the worker first, and reports its run while there is a server to report to."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for child in reversed(self.children):
            child.end(WORKER_SECONDS if child.name == WORKER else SERVER_SECONDS)
            if child.name == WORKER:
                end_orphans(self.children, self.others)
                if all(c.process.poll() is None for c in self.children if c.name == SERVER):
                    self._end_dead_runs(self.worker)
        end_orphans(self.children, self.others)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is inside as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _client() -> Iterator["SyncPrefectClient"]:
    """A client of the server that the environment names."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client
