"""Serving a model: the folder or version that is meant, its process, and what follows an alias."""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from compress_core.errors import ConfigError, ModelError
from flows.runs.referring import folder_or_version
from flows.server.backend import Backend, ServingError, address, start, wait_until_ready
from flows.server.children import bind
from storage.disk import make_folder
from tasks.tracking.client import Version
from tasks.tracking.speaking import TrackingError
from tasks.tracking.versions import check_files, find_version

if TYPE_CHECKING:
    from flows.server.front import Front

FOLLOW_SECONDS = 2  # between looks at what an alias means
RETRY_SECONDS = 60  # until a version that could not take over is tried again; then twice that
LONGEST_RETRY_SECONDS = 3600  # a try reads its files whole, beside the model that is served
LOOK_SECONDS = 0.2  # between looks at a process, and at what an old one still answers
GRACE_SECONDS = 3  # for requests in flight when the command is stopped
LIBRARIES = ("fastapi", "httpx", "openai", "uvicorn")


@dataclass(frozen=True)
class Asked:
    """What is to be served, and how.

    Args:
        home: The data directory.
        model: A folder, ``NAME``, ``NAME@ALIAS`` or ``NAME/NUMBER``.
        host: Name or address to listen on.
        port: 0 for a free one.
        device: As torch names it, or ``auto``.
        follow: Whether what ``model`` means is looked up again and again.
    """

    home: Path
    model: str
    host: str
    port: int
    device: str
    follow: bool


@dataclass(frozen=True)
class Found:
    """A folder, and the version that it is if one was asked for."""

    folder: Path
    version: Version | None

    @property
    def name(self) -> str:
        """What requests call it: the same for every version."""
        return self.version.name if self.version else self.folder.resolve().name

    def __str__(self) -> str:
        if self.version is None:
            return str(self.folder)
        return f"{self.version.name} version {self.version.version}"


@dataclass(frozen=True)
class Ready:
    """What there is once requests are answered: where, under which name, and the server's log."""

    url: str
    name: str
    what: str
    log: Path


def serve(asked: Asked, ready: Callable[[Ready], None], say: Callable[[str], None]) -> None:
    """Serves until interrupted (Ctrl-C or SIGTERM), then ends every process it started.

    Args:
        asked: What to serve.
        ready: Told once, when requests are answered.
        say: Told in a line whatever happens later.

    Raises:
        ConfigError: There is no such model, its address is taken, or a library is missing.
        ModelError: The folder holds no model.
        TrackingError: The version's files are not what was registered.
        ServingError: The model cannot be loaded, or its process ended.
    """
    _check_libraries()
    found = _find(asked, say)
    if asked.follow and found.version is None:
        raise ConfigError(f"--follow needs a registered NAME or NAME@ALIAS; {found} is a folder")
    server = _Server(asked, say)
    listener = bind(asked.port, "--port", asked.host)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run((server.follow if asked.follow else server.hold)(found, listener, ready))
    except KeyboardInterrupt:
        say("stopped")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the processes are being ended already
        for backend in server.backends:
            backend.stop()


class _Server:
    """The processes of one command."""

    def __init__(self, asked: Asked, say: Callable[[str], None]) -> None:
        self.backends: list[Backend] = []
        self._asked, self._say = asked, say
        self._ending: list[asyncio.Task[None]] = []
        make_folder(asked.home / "logs")
        self._log = (
            asked.home / "logs" / f"serve-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log"
        )

    async def hold(
        self, found: Found, listener: socket.socket, ready: Callable[[Ready], None]
    ) -> None:
        """Serves one model on the socket itself, until its process ends."""
        backend = await self._start(found, listener)
        ready(Ready(backend.url, found.name, str(found), self._log))
        while backend.lives:
            await asyncio.sleep(LOOK_SECONDS)
        raise backend.complaint()

    async def follow(
        self, found: Found, listener: socket.socket, ready: Callable[[Ready], None]
    ) -> None:
        """Serves whatever is meant at the time, through a front that holds the socket."""
        import uvicorn

        from flows.server.front import Front

        front = Front(await self._start(found, bind(0, "port")))
        config = uvicorn.Config(front, lifespan="off", log_config=None, access_log=False)
        config.timeout_graceful_shutdown = GRACE_SECONDS
        errors = logging.getLogger("uvicorn.error")
        errors.propagate = False  # or the requests that a stop cuts off are tracebacks on stderr
        errors.addHandler(logging.FileHandler(self._log))
        ready(Ready(address(listener), found.name, str(found), self._log))
        watching = asyncio.create_task(self._watch(found, front))
        server = uvicorn.Server(config)
        watching.add_done_callback(lambda _: setattr(server, "should_exit", True))
        try:
            await server.serve(sockets=[listener])
        finally:
            watching.cancel()
        await watching

    async def _watch(self, current: Found, front: "Front") -> None:
        """Changes the front's backend when another version is meant; ends when a process does."""
        failed, again, wait, trouble = 0, 0.0, float(RETRY_SECONDS), ""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            if not front.backend.lives:
                raise front.backend.complaint()
            try:
                meant = await asyncio.to_thread(find_version, self._asked.home, self._asked.model)
                assert current.version is not None
                if meant.version == current.version.version:
                    failed, trouble = 0, ""
                    continue
                if meant.version == failed and time.monotonic() < again:
                    continue
                wait = min(2 * wait, LONGEST_RETRY_SECONDS)
                if meant.version != failed:
                    wait = RETRY_SECONDS
                failed, again = meant.version, time.monotonic() + wait
                found = await asyncio.to_thread(_find, self._asked, self._say)
                backend = await self._start(found, bind(0, "port"))
            except (ServingError, TrackingError, ConfigError, ModelError) as error:
                if str(error) != trouble:
                    trouble = str(error)
                    self._say(f"{current} is served on: {trouble}")
                continue
            old, front.backend, trouble = front.backend, backend, ""
            self._say(f"{found} is served; {current} ends with its last request")
            current = found
            self._ending.append(asyncio.create_task(self._end(old)))

    async def _end(self, backend: Backend) -> None:
        while backend.in_flight:
            await asyncio.sleep(LOOK_SECONDS)
        await asyncio.to_thread(backend.stop)
        self.backends.remove(backend)

    async def _start(self, found: Found, listener: socket.socket) -> Backend:
        backend = start(
            found.folder,
            found.name,
            str(found),
            listener=listener,
            device=self._asked.device,
            log=self._log,
        )
        self.backends.append(backend)
        try:
            await wait_until_ready(backend)
        except ServingError:
            backend.stop()
            self.backends.remove(backend)
            raise
        return backend


def _check_libraries() -> None:
    absent = [name for name in LIBRARIES if find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"serving needs {', '.join(absent)}: install them with pip install 'eigenpress[serve]'"
        )


def _find(asked: Asked, say: Callable[[str], None]) -> Found:
    folder, version = folder_or_version(asked.model, asked.home)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    found = Found(folder, version)
    if version is not None and not check_files(folder, version):
        say(f"no digests of its files were recorded with {found}: they are served as they are now")
    return found
