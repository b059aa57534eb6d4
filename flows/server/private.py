"""The Prefect server as a child process, run as a script: runtime.py's private one, or `up`'s.

    python -P private.py SOCKET PARENT [lasting]

It is Prefect's own API server, on a socket inherited from the parent, with what the traps of
Prefect's built-in ephemeral server call for: task runs written in batches, nothing lost at the end,
one migration at a time, and no orphan when the parent is killed. A lasting one has the page, the
services that schedule, and automations.
"""

import fcntl
import os
import socket
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where this lies, wherever that is
from flows.server.leash import Leash, WithoutSecrets

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
}
# Of a private one, besides.
BRIEF = {
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
LEASES = "prefect.server.concurrency.lease_storage"
# Of a lasting one, besides.
LASTING = {
    # In memory, the default, they are gone with the server, and the slots that they stand for are
    # held for ever: a deployment with a limit of one never runs again.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": f"{LEASES}.filesystem",
    "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "flows.server.ordering",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
}
LAST_ANSWERS_SECONDS = 3  # for requests in the air and web pages that listen, when a server ends


def serve(listener: socket.socket, leash: Leash, lasting: bool = False) -> None:
    """Serve Prefect's API until told to stop or left alone.

    Args:
        listener: The bound socket to serve on.
        leash: Ends the server with its parent.
        lasting: Whether it schedules and has a page, and is not for one command alone.
    """
    for name, value in (DEFAULTS | (LASTING if lasting else BRIEF)).items():
        os.environ.setdefault(name, value)
    os.environ.update({"PREFECT__SERVER_FINAL": "1"} if lasting else EPHEMERAL)
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
    server = Server(
        uvicorn.Config(
            app,
            factory=True,
            lifespan="on",
            log_level="error",
            timeout_graceful_shutdown=LAST_ANSWERS_SECONDS if lasting else None,
        )
    )

    def end() -> None:
        if not server.started:
            os._exit(0)  # nothing was recorded yet
        server.should_exit = True

    leash.end = end
    server.run(sockets=[listener])


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
    serve(socket.socket(fileno=int(sys.argv[1])), leash, lasting="lasting" in sys.argv[3:])
