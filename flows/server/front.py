"""What stands before served models where one takes another's place without a lost request.

A request goes to the backend that is current when it arrives, and ends there, streams too.
"""

from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from flows.server.backend import Backend

OF_ONE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "upgrade", "host"}


class Front:
    """An ASGI application that hands every request to the current backend.

    Args:
        backend: The first one; set the attribute to switch.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        # Requests wait for one another in the backend, as long as it takes.
        self._client = httpx.AsyncClient(
            timeout=None,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        request = Request(scope, receive)
        backend = self.backend
        backend.in_flight += 1
        try:
            await self._hand_on(request, backend, send)
        except httpx.TransportError as error:
            words = f"the served model does not answer: {type(error).__name__}"
            lost = JSONResponse({"error": {"message": words, "type": "server_error"}}, 502)
            await lost(scope, receive, send)
        finally:
            backend.in_flight -= 1

    async def _hand_on(self, request: Request, backend: Backend, send: Any) -> None:
        query = f"?{request.url.query}" if request.url.query else ""
        async with self._client.stream(
            request.method,
            f"{backend.url}{request.url.path}{query}",
            headers=_handed_on(request.headers.items()),
            content=await request.body(),
        ) as answer:
            response = StreamingResponse(answer.aiter_raw(), answer.status_code)
            kept = _handed_on(answer.headers.multi_items())
            response.raw_headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in kept]
            await response(request.scope, request.receive, send)


def _handed_on(headers: Any) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in OF_ONE_CONNECTION]
