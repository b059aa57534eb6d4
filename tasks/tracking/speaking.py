"""How MLflow is spoken to: the address, one client for it, and its errors as one line of ours.

MLflow is imported inside the functions (it takes more than a second). Everything goes through one
client per address; MLflow's global state (active run, current address) is neither read nor set.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from compress_core.secrets import hide

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Defaults, set before MLflow is imported: it prints addresses on stdout, logs every version it
# registers and reports its use.
QUIET = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what goes wrong is raised, and said once
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
ANSWER_SECONDS = 5  # how long a server may take to say anything at all
# Defaults for as long as somebody waits for an answer; MLflow's own are minutes of retries, which
# are right for the end of a run.
IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER_SECONDS),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT": str(ANSWER_SECONDS),
}
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
LONGEST = 300  # characters of what a server answers


class TrackingError(RuntimeError):
    """MLflow cannot be reached or refuses what it was given."""


def tracking_uri(home: Path) -> str:
    """The address in `MLFLOW_TRACKING_URI`, or else a SQLite file in the data directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve() / 'mlflow.db'}"


def is_server(uri: str) -> bool:
    """Whether an address is that of a tracking server, to which files are uploaded."""
    return urlsplit(uri).scheme in ("http", "https")


def is_database(uri: str) -> bool:
    """Whether an address is that of a database, which MLflow opens itself."""
    return urlsplit(uri).scheme.partition("+")[0] in {"sqlite", *PORTS}


def be_quiet() -> None:
    """Sets MLflow's defaults; to be called before it is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def speaking(home: Path, to: str) -> Iterator["MlflowClient"]:
    """A client for the length of a conversation; whatever goes wrong in it becomes one line.

    Args:
        home: The data directory.
        to: What the conversation is for, for the refusal: "to record the run".

    Raises:
        TrackingError: MLflow cannot be reached or refuses.
    """
    be_quiet()
    uri = tracking_uri(home)
    try:
        yield _client(uri, home)
    except TrackingError:
        raise
    except Exception as error:  # MLflow lets through what its libraries raise, each their own
        raise TrackingError(_refusal(uri, to, error)) from error


@contextmanager
def impatient() -> Iterator[None]:
    """Short time-outs and few retries for a while, unless the user has set others."""
    ours = {name: value for name, value in IMPATIENT.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Only one process of a data directory at a time."""
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "mlflow.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def _client(uri: str, home: Path) -> "MlflowClient":
    from mlflow import MlflowClient

    with alone(home):  # two processes that find the same fresh database must not both migrate it
        if is_database(uri):
            _open_database(uri)
        client = MlflowClient(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)
        if is_database(uri):
            client.search_experiments(max_results=1)
    return client


def _open_database(uri: str) -> None:
    """Connects once as MLflow does, but without its ten attempts, which take two minutes."""
    import sqlalchemy
    from mlflow.store.db.utils import create_sqlalchemy_engine

    place = sqlalchemy.make_url(uri)
    port = place.port or PORTS.get(place.get_backend_name())
    if place.host and port:  # the drivers would wait for minutes for a host that is not there
        socket.create_connection((place.host, port), ANSWER_SECONDS).close()
    elif place.database and not place.database.startswith("file:"):
        Path(place.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_sqlalchemy_engine(uri)
    sqlalchemy.inspect(engine)
    engine.dispose()


def _refusal(uri: str, to: str, error: Exception) -> str:
    """One line: what was refused, where and why, with the reason from below MLflow's wrapping."""
    from requests.exceptions import ConnectionError as NoConnection
    from requests.exceptions import RequestException, Timeout

    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    wrapped = any(isinstance(one, RequestException) for one in chain)
    lines = str(chain[-1] if wrapped else error).strip().splitlines()
    reason = hide(lines[0])[:LONGEST] if lines else type(error).__name__
    silent = (NoConnection, Timeout, ConnectionError, TimeoutError, socket.gaierror)
    if any(isinstance(one, silent) for one in chain):
        return (
            f"no MLflow server answers at {hide(uri)} ({reason}); start it, or unset "
            "MLFLOW_TRACKING_URI to track in the data directory"
        )
    return f"MLflow at {hide(uri)} refused {to}: {reason}"
