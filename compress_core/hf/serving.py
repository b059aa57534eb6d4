"""`transformers serve` for one folder in the compressed format, and for nothing else.

The program is transformers' own. It would also load whatever model a request names, from anywhere:
here it is pinned to one, and only the addresses that ask that one are answered.
"""

import os
import socket
from collections.abc import Awaitable, Callable
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
    """Errors in OpenAI's form, with a word of what was wrong; else they are "Internal error"."""
    from fastapi.responses import JSONResponse

    def answer(status: int) -> Callable[[Any, Exception], Awaitable[JSONResponse]]:
        async def told(_: Any, error: Exception) -> JSONResponse:
            words = " ".join(hide(f"{type(error).__name__}: {error}").split())
            kind = "invalid_request_error" if status < 500 else "server_error"
            return JSONResponse({"error": {"message": words, "type": kind}}, status_code=status)

        return told

    for kind in OF_THE_REQUEST:
        app.add_exception_handler(kind, answer(400))
    app.add_exception_handler(Exception, answer(500))


def _only_answered(app: Any) -> Any:
    """An ASGI application that has these addresses and no others."""
    from fastapi.responses import JSONResponse

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in ANSWERED:
            words = f"there is no {scope['path']} here; there are {', '.join(ANSWERED)}"
            error = {"error": {"message": words, "type": "invalid_request_error"}}
            await JSONResponse(error, status_code=404)(scope, receive, send)
        else:
            await app(scope, receive, send)

    return guarded
