"""The private Prefect server: the child process that runtime.py starts, run as a script.

It is Prefect's own API server, on a socket inherited from the parent, with what the traps of
Prefect's built-in ephemeral server call for: task runs written in batches, nothing lost at the end,
one migration at a time, and no orphan when the parent is killed.
"""

import fcntl
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

WATCH_SECONDS = 0.1  # between looks at the parent
GRACE_SECONDS = 1.5  # from the parent's end: what is not written by then is lost, with the parent
DRAIN_SECONDS = 10  # for events that are still on their way into the database
FLUSH_SECONDS = 1  # Prefect takes whole seconds
BATCH = 500  # task runs in a statement: some 35 values each, and SQLite takes 32766

# Defaults: what the user has in the environment stays.
DEFAULTS = {
    # Task runs are written one by one by default. Each write can meet SQLite's lock, upon which the
    # client sleeps two seconds without a word, and at exit 9 of 10 task runs were still unwritten.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": str(BATCH),
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": str(BATCH),
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": str(FLUSH_SECONDS),
    # Automations and the event feed have no reader here, and their writes compete for SQLite's lock
    # with the task runs': a flow of 300 tasks takes 4.3 s in all without them, 6.0 s with them.
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
}
# What Prefect itself sets for a server that serves one process and no UI.
EPHEMERAL = {
    "PREFECT_UI_ENABLED": "false",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    # The command keeps its own console quiet; this one's is the log, which says why it failed.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",
}


class Leash:
    """Ends this process when its parent is gone, in good order if that is quick.

    It holds from the first line on, through imports and migrations, which take long on a busy
    machine. The last word is the kernel's: a timer that no thread of Python has to notice. A
    migration that it cuts off is one transaction, which SQLite takes back.

    Args:
        parent: Process id of the parent. (A pipe from it would stay open in its forked children,
            and PR_SET_PDEATHSIG would mean the thread that started this process.)
    """

    def __init__(self, parent: int) -> None:
        self.server: Any = None
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        threading.Thread(target=self._watch, args=(parent,), daemon=True).start()

    def _watch(self, parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        if self.server is None or not self.server.started:
            os._exit(0)  # nothing was recorded yet
        self.server.should_exit = True


class WithoutSecrets:
    """A stream for the log, with passwords hidden: libraries name addresses in their errors."""

    def __init__(self, stream: IO[str]) -> None:
        # The script runs alone; what it is part of lies here, wherever that is installed.
        sys.path.append(str(Path(__file__).resolve().parents[2]))
        from compress_core.secrets import hide

        self._stream, self._hide = stream, hide

    def write(self, text: str) -> int:
        """As the stream's own."""
        return self._stream.write(self._hide(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def serve(listener: socket.socket, leash: Leash) -> None:
    """Serve Prefect's API until told to stop or left alone.

    Args:
        listener: The bound socket to serve on.
        leash: Ends the server with its parent.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(EPHEMERAL)
    import uvicorn  # takes long, and what it needs must not come before the leash

    class Server(uvicorn.Server):
        """Uvicorn with a lock around the start and a wait before the end."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Start while no other process of this home does: both would migrate."""
            with open(Path(os.environ["PREFECT_HOME"], "start.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                await super().startup(sockets)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Stop once every event that arrived is with the service that writes it."""
            await _events_taken()
            await super().shutdown(sockets)

    app = "prefect.server.api.server:create_app"
    leash.server = Server(uvicorn.Config(app, factory=True, lifespan="on", log_level="error"))
    leash.server.run(sockets=[listener])


async def _events_taken() -> None:
    """Wait until no event is queued; what a service holds then, it writes when it is stopped."""
    import asyncio

    # Imported late: Prefect reads the environment when it is imported.
    from prefect.server.utilities.messaging.memory import METRICS

    deadline = time.monotonic() + DRAIN_SECONDS
    events = METRICS["events"]
    seen = -1
    while time.monotonic() < deadline:
        if events["published"] == events["consumed"] == seen:
            break
        seen = events["published"]
        await asyncio.sleep(0.05)
    if seen > BATCH:
        # Stopping cancels a write in progress and then writes one batch. With more than that at
        # stake, let the write end first.
        await asyncio.sleep(FLUSH_SECONDS + 0.2)


if __name__ == "__main__":
    leash = Leash(int(sys.argv[2]))
    sys.stderr = WithoutSecrets(sys.stderr)
    serve(socket.socket(fileno=int(sys.argv[1])), leash)
