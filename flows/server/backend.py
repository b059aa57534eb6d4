"""A served model in a process of its own: started, waited for, stopped.

Importing this imports nothing heavy; the child does (model_server.py).
"""

import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flows.server.children import SCRIPTS, Child, start_child

STOP_SECONDS = 10  # a backend takes three for requests in flight
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class ServingError(RuntimeError):
    """A served model's process ended, or never answered."""


@dataclass
class Backend:
    """One process that serves one folder."""

    url: str
    child: Child
    place: Path
    in_flight: int = 0

    @property
    def lives(self) -> bool:
        """Whether the process is there."""
        return self.child.process.poll() is None

    def complaint(self) -> ServingError:
        """Why it ended."""
        with suppress(subprocess.TimeoutExpired):
            self.child.process.wait(STOP_SECONDS)
        return ServingError(self.child.complaint)

    def stop(self) -> None:
        """Ends the process, with what it still answers; does nothing where it has ended."""
        if self.lives:
            self.child.end(STOP_SECONDS)
        shutil.rmtree(self.place, ignore_errors=True)


def address(listener: socket.socket) -> str:
    """The URL of a socket as this machine reaches it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def start(
    folder: Path, name: str, what: str, *, listener: socket.socket, device: str, log: Path
) -> Backend:
    """Starts a process that will serve a folder, and returns at once.

    Args:
        folder: The model's.
        name: What requests call it.
        what: What it is, in messages.
        listener: Socket to serve on; closed here, so that its other end notices the child's end.
        device: As torch names it, or ``auto``.
        log: File to which the child's words are added.
    """
    place = Path(tempfile.mkdtemp(prefix="eigenpress-serve-"))
    script = str(SCRIPTS / "model_server.py")
    words = [script, str(folder.absolute()), name, device, str(place)]
    with listener:
        url = address(listener)
        child = start_child(
            f"the server of {what}", words, log, os.environ | OFFLINE, listener.fileno()
        )
    return Backend(url, child, place)


async def wait_until_ready(backend: Backend) -> None:
    """One request, however long it takes: it waits in the socket's queue till the model is loaded.

    When the child ends, so does the connection.

    Raises:
        ServingError: It ended.
    """
    import httpx

    try:
        async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
            (await client.get(f"{backend.url}/health")).raise_for_status()
    except httpx.HTTPError as error:
        raise backend.complaint() from error
