"""A Prefect server that is gone: which exceptions mean that, and what it was still to get."""

import queue
import sys
from contextlib import suppress

from compress_core.secrets import hide


def failure_of_server(error: BaseException | None, address: str) -> str | None:
    """The reason in an exception, or in one that it came from, of a request to Prefect's server.

    Args:
        error: What was raised.
        address: Of the server's API.
    """
    import httpx

    place = httpx.URL(address)
    while error is not None:
        request = getattr(error, "_request", None) if isinstance(error, httpx.HTTPError) else None
        if request is not None and request.url.netloc == place.netloc:
            return hide((str(error).splitlines() or [type(error).__name__])[0])
        error = error.__cause__ or error.__context__
    return None


def forget_events() -> None:
    """Drops what waits to be sent to a server that is gone: each event would be tried for ten
    seconds before the command can end. Prefect has no word for this.
    """
    if "prefect.events.worker" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker

    for worker in list(EventsWorker._instances.values()):  # type: ignore[misc]
        with suppress(queue.Empty):
            while True:
                worker._queue.get_nowait()
        if (client := getattr(worker, "_client", None)) is not None:
            client._reconnection_attempts = 0
