"""What every request passes before a route sees it: token, size of the body, the count."""

import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse

from jaxfusion.serving.metrics import Metrics
from jaxfusion.serving.replies import error_body

BODY = 1_000_000  # bytes
DISCARD = 64 * BODY  # of a larger body, so that its client reads the answer
GUARDED = ("/v1/", "/api/")
PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/api/about", "/api/explain",
         "/health", "/metrics", "/")


class Guard:
    """ASGI middleware around the routes.

    Args:
      token: that requests for the models have to bear; None: they need none.
    """

    def __init__(self, app: Callable[..., Awaitable], metrics: Metrics, token: str | None):
        self.app, self.metrics, self.token = app, metrics, token

    async def __call__(self, scope: dict[str, Any], receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.monotonic(), [499]  # of a client that went away first

        async def counted(message):
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, counted)
        except Exception:
            status[0] = 500  # its reply is made further out
            raise
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.count(path, status[0], time.monotonic() - begun)

    async def _answer(self, scope, receive, send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"].startswith(GUARDED) and not self._may(headers.get(b"authorization", b"")):
            refusal = JSONResponse(error_body(
                "the server wants its token: Authorization: Bearer TOKEN (api_key of the openai "
                "client)", code="invalid_api_key"), 401, {"WWW-Authenticate": "Bearer"})
            return await refusal(scope, receive, send)
        body = await _read(receive)
        if body is None:
            refusal = JSONResponse(error_body(
                f"the body is larger than {BODY:,} bytes; send fewer or shorter prompts",
                code="request_too_large"), 413)
            return await refusal(scope, receive, send)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    def _may(self, given: bytes) -> bool:
        wanted = f"Bearer {self.token}".encode()
        return self.token is None or hmac.compare_digest(given, wanted)


async def _read(receive) -> bytes | None:
    """The whole body; None if it is too large."""
    parts, size, more = [], 0, True
    while more and size <= DISCARD:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        size += len(message.get("body", b""))
        if size <= BODY:
            parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts) if size <= BODY else None
