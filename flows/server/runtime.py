"""Prefect and the other libraries made safe for somebody who has never started a server.

Importing this module imports nothing of Prefect. `start_early` starts a private server (server.py)
as a child process while the caller still parses and imports, `ready` waits for it, `flow_settings`
wraps a flow, and at exit the child is stopped once every task run has reached its database.
"""

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from storage.disk import make_folder

START_SECONDS = 180  # a fresh database under load took 19 s; Prefect's limit of 20 s is too near
STOP_SECONDS = 30  # the child needs well under two unless the machine is very busy

SERVER = str(Path(__file__).with_name("private.py"))

# Defaults only: what the user has in the environment stays.
DEFAULTS = {
    # Any other Prefect client under this home may start a server too, and gets as long for it.
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(START_SECONDS),
    # Our own lines say what happens; Prefect's would say it a second time (both go to stderr).
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # Our own progress and refusals are what the user sees; the libraries' would be between them.
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # No library calls home.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class ServerError(RuntimeError):
    """The Prefect server, private or the user's own, does not answer."""


@dataclass
class _Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    log_start: int
    owner: int
    used: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def complaint(self) -> str:
        """What the child wrote since it was started, its last lines."""
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace").strip()
        return "\n".join(text.splitlines()[-5:]) or "it wrote nothing"


_server: _Server | None = None
_foreign: str | None = None  # the address of the user's own server


def prepare_environment(home: Path) -> None:
    """Set the environment that Prefect, MLflow and HuggingFace read when they are imported.

    Args:
        home: The data directory; Prefect's database goes to `<home>/prefect`.
    """
    directory = home.resolve() / "prefect"
    make_folder(directory)
    for name, value in {"PREFECT_HOME": str(directory), **DEFAULTS}.items():
        os.environ.setdefault(name, value)


def start_early() -> None:
    """Start the private server and return at once; does nothing where the user named a server.

    Call it after `prepare_environment` and before the heavy imports, so that both go on at once.
    """
    global _server, _foreign
    if _server is not None or _foreign is not None:
        return
    _foreign = _named_server()
    if _foreign is not None:
        return
    directory = Path(os.environ["PREFECT_HOME"])
    log = directory / "server.log"
    with socket.socket() as listener, log.open("ab") as output:
        # Bound here and inherited: no race for a port, and an early request waits in the queue.
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        process = subprocess.Popen(
            # -P: a folder named `tasks` or `flows` where the user stands must not shadow anything.
            [sys.executable, "-P", SERVER, str(listener.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is for the parent, which still has to record it
        )
        port = listener.getsockname()[1]
        _server = _Server(process, port, log, output.tell(), os.getpid())
    os.environ["PREFECT_API_URL"] = _server.url
    for name in ("NO_PROXY", "no_proxy"):  # a proxy, where there is one, cannot reach the child
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
    _reload_settings()
    atexit.register(stop)


def ready() -> None:
    """Wait until the server answers, the private one or the one that the user named.

    Raises:
        ServerError: It does not; with the last lines of the private server's log.
    """
    start_early()
    if _foreign is not None:
        _check_foreign(_foreign)
    elif _server is not None and not _server.used:
        # One request is enough: it waits in the socket's queue and fails when the child ends.
        connection = HTTPConnection("127.0.0.1", _server.port, timeout=START_SECONDS)
        try:
            connection.request("GET", "/api/health")
            status = connection.getresponse().status
        except OSError as error:
            raise ServerError(
                f"the private Prefect server gave no answer ({error or type(error).__name__}); "
                f"its log is {_server.log} and ends with\n{_server.complaint()}"
            ) from error
        finally:
            connection.close()
        if status != 200:
            raise ServerError(f"the private Prefect server answers {status}; see {_server.log}")
        _server.used = True


@contextmanager
def flow_settings() -> Iterator[None]:
    """Prefect's settings for the time of a flow: no heartbeat, unless the user named a server.

    The heartbeat lets a long-lived server notice a dead run. Here the server dies with the run, and
    joining the heartbeat's thread costs every flow one second. Only code can switch it off: the
    environment's value has to be a number.
    """
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    ready()
    # At exit it warns of every event still to be sent, however short the wait.
    logging.getLogger("EventsWorker").setLevel(logging.ERROR)
    if _foreign is not None:
        yield
        return
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def stop() -> None:
    """Stop the private server once every task run is in its database; safe to call at any time."""
    global _server
    if _server is None or _server.owner != os.getpid():  # a forked child inherits this handler
        return
    server, _server = _server, None
    atexit.unregister(stop)
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


def _named_server() -> str | None:
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


def _check_foreign(url: str) -> None:
    """Refuse a server that cannot be connected to, before Prefect retries for minutes."""
    if getproxies():
        return  # the way there may lead through the proxy
    place = urlsplit(url)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise ServerError(
            f"no Prefect server answers at PREFECT_API_URL={url} ({error}); "
            "start it, or unset the variable to use a private one"
        ) from error


def _reload_settings() -> None:
    """Let a Prefect that is imported already see the changed environment."""
    if "prefect.context" in sys.modules:
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()
