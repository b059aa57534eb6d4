"""Prefect and the other libraries made safe for somebody who has never started a server.

Importing this module imports nothing of Prefect. `start_early` starts a private server (private.py)
as a child process while the caller still parses and imports, `ready` waits for it, `flow_settings`
wraps a flow, and at exit the child is stopped once every task run has reached its database.
"""

import atexit
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.request import getproxies

from compress_core.secrets import hide
from flows.server.children import Child, bind, last_words, start_child
from flows.server.lost import failure_of_server, forget_events
from flows.server.running import running_server
from storage.disk import make_folder

START_SECONDS = 180  # of other clients' servers; a fresh database under load took 19 s
ANSWER_SECONDS = 5  # how long the user's server may take to say anything
STOP_SECONDS = 30  # the child needs well under two unless the machine is very busy

SERVER = str(Path(__file__).with_name("private.py"))

# Defaults only: what the user has in the environment stays.
DEFAULTS = {
    # Any other Prefect client under this home may start a server too, and gets as long for it.
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(START_SECONDS),
    # Our own lines say what happens; Prefect's would say it a second time (both go to stderr).
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # A line of thousands of characters for every event that a server, once it is gone, did not get.
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    # Our own progress and refusals are what the user sees; the libraries' would be between them.
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # No library calls home.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


Waiting = Callable[[str], AbstractContextManager[None]]  # says from time to time what it waits for


class ServerError(RuntimeError):
    """The Prefect server, private or the user's own, does not answer."""


@dataclass
class _Server:
    child: Child
    port: int
    owner: int
    used: bool = False

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.child.process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def complaint(self) -> str:
        """The last line that the child wrote, of those that name an exception if there are any."""
        return last_words(self.child.log, self.child.log_start)


_server: _Server | None = None
_foreign: str | None = None  # the address of the user's own server


def prepare_environment(home: Path) -> None:
    """Set the environment that Prefect, MLflow and HuggingFace read when they are imported.

    Where `eigenpress up` runs on this data directory, its server is the one; the user's own
    PREFECT_API_URL goes before it (an empty one asks for a private server).

    Args:
        home: The data directory; Prefect's database goes to `<home>/prefect`.

    Raises:
        StorageError: There is no way to make that folder.
    """
    for name, value in {"PREFECT_HOME": str(home.resolve() / "prefect"), **DEFAULTS}.items():
        os.environ.setdefault(name, value)
    make_folder(Path(os.environ["PREFECT_HOME"]))
    if "PREFECT_API_URL" not in os.environ and (server := running_server(home)):
        os.environ["PREFECT_API_URL"] = server
        go_around_proxies()


def start_early() -> None:
    """Start the private server and return at once; does nothing where the user named a server.

    Call it after `prepare_environment` and before the heavy imports, so that both go on at once.
    """
    global _server, _foreign
    if _server is not None or _foreign is not None:
        return
    _foreign = named_server()
    if _foreign is not None:
        return
    directory = Path(os.environ["PREFECT_HOME"])
    log = directory / "server.log"
    # Bound here and inherited: no race for a port, and an early request waits in the queue.
    with bind(0, "port") as listener:
        child = start_child(
            "the private Prefect server", [SERVER], log, dict(os.environ), listener.fileno()
        )
        _server = _Server(child, listener.getsockname()[1], os.getpid())
    os.environ["PREFECT_API_URL"] = _server.url
    go_around_proxies()
    _reload_settings()
    atexit.register(stop)


def go_around_proxies() -> None:
    """Lets no proxy stand before servers of this machine: it cannot reach them.

    Where both names are set the libraries read one of them only, so what the user has in either
    goes into both.
    """
    names = ("no_proxy", "NO_PROXY")
    around = [*filter(None, (os.environ.get(name) for name in names)), "127.0.0.1"]
    os.environ.update(dict.fromkeys(names, ",".join(dict.fromkeys(around))))


def ready(waiting: Waiting | None = None) -> None:
    """Wait until the server answers: the user's a few seconds, the private one while it lives.

    Args:
        waiting: Says that people wait, for as long as its context is open.

    Raises:
        ServerError: It does not; with the last lines of the private server's log.
    """
    start_early()
    if _foreign is not None:
        _ask(f"PREFECT_API_URL={hide(_foreign)}", "; start it, or unset it to use a private one")
    elif _server is not None and not _server.used:
        with waiting("starting Prefect") if waiting else nullcontext():
            _wait_for(_server)
        if any(kind != "no" for kind in getproxies()):  # which can be such that no client is made
            _ask("its private address", "; look at the proxies in the environment")
        _server.used = True


def _wait_for(server: _Server) -> None:
    """One request, however long it takes: it waits in the socket's queue till the child answers.

    When the child ends, so does the connection.
    """
    connection = HTTPConnection("127.0.0.1", server.port)
    try:
        connection.request("GET", "/api/health")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        raise ServerError(
            f"the private Prefect server ended before it answered: {server.complaint()} "
            f"(all of it in {server.child.log})"
        ) from error
    finally:
        connection.close()
    if status != 200:
        raise ServerError(f"the private Prefect server answers {status}; see {server.child.log}")


def _ask(where: str, advice: str) -> None:
    """Ask the server for something that needs permission, by the client that flows will use.

    So proxies, certificates, keys and versions count as they will later; but retries, which take
    minutes, don't.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import (
        PREFECT_API_REQUEST_TIMEOUT,
        PREFECT_CLIENT_MAX_RETRIES,
        temporary_settings,
    )

    brief = {PREFECT_API_REQUEST_TIMEOUT: ANSWER_SECONDS, PREFECT_CLIENT_MAX_RETRIES: 0}
    try:
        with temporary_settings(brief), get_client(sync_client=True) as client:
            client.read_flows(limit=1)
            client.raise_for_api_version_mismatch()
    except Exception as error:  # of httpx, Prefect, pydantic and ssl, each their own
        lines = str(error).splitlines() or [type(error).__name__]
        raise ServerError(
            f"no Prefect server answers at {where} ({hide(lines[0])}){advice}"
        ) from error


@contextmanager
def flow_settings(waiting: Waiting | None = None) -> Iterator[None]:
    """Prefect's settings for the time of a flow: no heartbeat, unless the user named a server.

    The heartbeat lets a long-lived server notice a dead run. Here the server dies with the run, and
    joining the heartbeat's thread costs every flow one second. Only code can switch it off: the
    environment's value has to be a number.

    Args:
        waiting: As of `ready`.

    Raises:
        ServerError: The server does not answer, now or in the middle of the flow.
    """
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    ready(waiting)
    # At exit it warns of every event still to be sent, however short the wait.
    logging.getLogger("EventsWorker").setLevel(logging.ERROR)
    quiet = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None} if _foreign is None else {}
    with temporary_settings(quiet), _answering():
        yield


@contextmanager
def _answering() -> Iterator[None]:
    """Turns what Prefect's client raises of a server that is gone into one line."""
    try:
        yield
    except Exception as error:
        if (reason := failure_of_server(error, _address())) is None:
            raise
        if _server is not None and _server.process.poll() is not None:
            reason = f"it ended: {_server.complaint()}"
        forget_events()
        raise ServerError(
            f"the Prefect server at {hide(_address())} failed in the middle of the run ({reason}); "
            "everything computed is kept: the same command goes on from here"
        ) from error


def stop() -> None:
    """Stop the private server once every task run is in its database; safe to call at any time."""
    global _server
    if _server is None or _server.owner != os.getpid():  # a forked child inherits this handler
        return
    server, _server = _server, None
    atexit.unregister(stop)
    if server.process.poll() is not None:
        forget_events()
    if "prefect.events.worker" in sys.modules:
        from prefect.events.worker import EventsWorker

        EventsWorker.drain_all()
    server.process.send_signal(signal.SIGTERM)
    if os.environ.get("PREFECT_API_URL") == server.url:
        del os.environ["PREFECT_API_URL"]
        _reload_settings()
    if not server.used:
        return  # nothing was recorded: it may finish starting and end by itself
    try:
        server.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()


def others_reach_it() -> bool:
    """Whether the server is one that other processes may know: not a command's private one."""
    return _server is None and named_server() is not None


def named_server() -> str | None:
    """The address in the user's environment, profile or project files, where there is one."""
    if "PREFECT_API_URL" in os.environ:
        return os.environ["PREFECT_API_URL"] or None
    places = (
        Path(os.environ["PREFECT_HOME"], "profiles.toml"),
        Path("prefect.toml"),
        Path(".env"),
        Path("pyproject.toml"),
    )
    if "PREFECT_PROFILE" not in os.environ and not any(
        word in place.read_text(errors="replace")
        for place in places
        if place.is_file()
        for word in ("PREFECT_API_URL", "[api]", "[tool.prefect")
    ):
        return None  # the common case, decided without the second that importing Prefect takes
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value()


def _address() -> str:
    """Where Prefect's API is."""
    return _server.url if _server is not None else _foreign or ""


def _reload_settings() -> None:
    """Let a Prefect that is imported already see the changed environment."""
    if "prefect.context" in sys.modules:
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()
