"""A served model in a process of its own: started, waited for, stopped.

Importing this imports nothing heavy; the child does (model_server.py).
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from compress_core.errors import ConfigError
from compress_core.secrets import hide

STOP_SECONDS = 10  # a backend takes three for requests in flight
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class ServingError(RuntimeError):
    """A served model's process ended, or never answered."""


@dataclass
class Backend:
    """One process that serves one folder."""

    what: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    place: Path
    in_flight: int = 0

    def complaint(self) -> ServingError:
        """Why it ended: by which signal, else by the last line that it wrote."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        if (code := self.process.returncode) is not None and code < 0:
            name = signal.Signals(-code).name
            return ServingError(f"the server of {self.what} was ended by {name}; see {self.log}")
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = hide((lines or ["nothing"])[-1])
        return ServingError(f"the server of {self.what} ended: {last} (all of it in {self.log})")

    def stop(self) -> None:
        """Ends the process, with what it still answers; does nothing where it has ended."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.place, ignore_errors=True)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything is loaded.

    Args:
        host: Name or address to listen on.
        port: 0 for a free one.

    Raises:
        ConfigError: It is taken, or there is no such host.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot serve on {host} port {port}: {reason}; choose others with --host and "
            "--port (--port 0 takes a free one)"
        ) from None


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
    with listener, log.open("ab") as output:
        command = [sys.executable, "-P", "-m", "flows.server.model_server"]
        words = [listener.fileno(), os.getpid(), folder.absolute(), name, device, place]
        process = subprocess.Popen(
            [*command, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            env=os.environ | OFFLINE,
            start_new_session=True,  # Ctrl-C is for the parent, which stops it in its own order
        )
        return Backend(what, address(listener), process, log, output.tell(), place)


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
