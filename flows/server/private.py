"""The private Prefect server: the child process that runtime.py starts, run as a script.

It is Prefect's own API server, on a socket inherited from the parent, with what the traps of
Prefect's built-in ephemeral server call for: task runs written in batches, nothing lost at the end,
one migration at a time, and no orphan when the parent is killed.
"""

import asyncio
import fcntl
import os
import socket
import sys
import threading
import time
from pathlib import Path

import uvicorn

WATCH_SECONDS = 0.5  # how long the parent may be gone before this process goes too
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
}


class Server(uvicorn.Server):
    """Uvicorn with a lock around the start and a wait before the end."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start while no other process of this home does: both would migrate a fresh database."""
        with open(Path(os.environ["PREFECT_HOME"], "start.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop once every event that arrived is with the service that writes it."""
        await _events_taken()
        await super().shutdown(sockets)


async def _events_taken() -> None:
    """Wait until no event is queued; what a service holds then, it writes when it is stopped."""
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


def serve(listener: socket.socket, parent: int) -> None:
    """Serve Prefect's API until told to stop or left alone.

    Args:
        listener: The bound socket to serve on.
        parent: Process id of the parent; when it is gone, the server ends in good order.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(EPHEMERAL)
    app = "prefect.server.api.server:create_app"
    server = Server(uvicorn.Config(app, factory=True, lifespan="on", log_level="error"))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
