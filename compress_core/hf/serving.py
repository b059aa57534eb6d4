"""`transformers serve` for one folder in the compressed format, and for nothing else.

The program is transformers' own. It would also load whatever model a request names, from anywhere:
here it is pinned to one, and only the addresses that ask that one are answered.
"""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

import compress_core.hf  # noqa: F401  teaches transformers the format
from compress_core.secrets import hide

ANSWERED = ("/health", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses")
OF_THE_REQUEST = (ValueError, TypeError, KeyError, jinja2.TemplateError)
GRACE_SECONDS = 3  # for requests in flight when the server is told to stop


def serve_folder(
    folder: Path,
    name: str,
    listener: socket.socket,
    device: str,
    place: Path,
    started: Callable[[Any], None],
) -> None:
    """Serves a model folder, compressed or not, until the process is told to stop.

    It changes the process for good (working directory, uvicorn's server): give it one of its own.

    Args:
        folder: The model's, with its tokenizer.
        name: What requests call the model.
        listener: The bound socket to serve on.
        device: As torch names it, or ``auto``.
        place: An empty folder, in which a link gives the model its name.
        started: Is handed uvicorn's server before it runs.

    Raises:
        OSError, ValueError: What transformers says of a folder that it cannot load.
    """
    import uvicorn
    from transformers.cli.serve import Serve

    class Server(uvicorn.Server):
        """Uvicorn on the socket that is there already, for the addresses that are answered."""

        def __init__(self, config: uvicorn.Config) -> None:
            _tell_errors(config.app)
            config.app = _only_answered(config.app)
            config.timeout_graceful_shutdown = GRACE_SECONDS
            super().__init__(config)
            started(self)

        def run(self, sockets: list[socket.socket] | None = None) -> None:
            super().run(sockets=[listener])

    # transformers names a model in its answers as it was told to load it: by a path of the machine.
    (place / name).symlink_to(folder.resolve(), target_is_directory=True)
    os.chdir(place)
    uvicorn.Server = Server  # type: ignore[misc]
    Serve(force_model=name, device=device)


def _tell_errors(app: Any) -> None:
    """Errors in OpenAI's form, with a word of what was wrong; else its clients show none."""
    from starlette.exceptions import HTTPException

    async def told(_: Any, error: Exception) -> Any:
        if isinstance(error, HTTPException):
            return _refusal(error.status_code, str(error.detail))
        status = 400 if isinstance(error, OF_THE_REQUEST) else 500
        return _refusal(status, f"{type(error).__name__}: {error}")

    for kind in (HTTPException, *OF_THE_REQUEST, Exception):
        app.add_exception_handler(kind, told)


def _refusal(status: int, words: str) -> Any:
    from fastapi.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": hide(" ".join(words.split())), "type": kind}
    return JSONResponse({"error": error}, status_code=status)


def _only_answered(app: Any) -> Any:
    """An ASGI application that has these addresses and no others."""

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in ANSWERED:
            words = f"there is no {scope['path']} here; there are {', '.join(ANSWERED)}"
            await _refusal(404, words)(scope, receive, send)
            return
        try:
            await app(scope, receive, send)
        except Exception:
            # It is answered, and raised again for a log. Left to uvicorn it would cost the
            # connection, on which the next request may be under way.
            traceback.print_exc()

    return guarded
