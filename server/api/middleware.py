"""The outermost layer: every request gets an id, every reply carries it, and no exception gets past it unanswered.

Knows nothing of routes. Plain ASGI, so that streams pass through untouched.
"""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_handlers import header_limit_response, internal_error_response

logger = logging.getLogger(__name__)

_CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")


class RequestMiddleware:
    """Adds x-request-id (the client's own when it is plain) and, to whole replies, openai-processing-ms.

    Headers over `max_header_bytes` are answered 431. h11 has the same limit, but looks at it only while headers are
    incomplete, and one read from the socket may bring 256 KiB of them complete.
    """

    def __init__(self, app: ASGIApp, *, max_header_bytes: int) -> None:
        self._app = app
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        began = time.perf_counter()
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _add_headers(message, request_id, time.perf_counter() - began)
            await send(message)

        try:
            if _num_header_bytes(scope) > self._max_header_bytes:
                refusal = header_limit_response(Request(scope), self._max_header_bytes)
                await refusal(scope, receive, send_with_headers)
                return
            await self._app(scope, receive, send_with_headers)
        except Exception:
            logger.exception("request %s failed", request_id)
            if started:
                raise
            await internal_error_response(Request(scope))(scope, receive, send_with_headers)


def _num_header_bytes(scope: Scope) -> int:
    headers = sum(len(name) + len(value) + 4 for name, value in scope["headers"])  # 4: colon, space, line end
    return headers + len(scope["path"]) + len(scope["query_string"])


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    request_id = given if _CLIENT_REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
    scope.setdefault("state", {})["request_id"] = request_id
    return request_id


def _add_headers(message: Message, request_id: str, seconds: float) -> None:
    headers = MutableHeaders(scope=message)
    headers["x-request-id"] = request_id
    if not headers.get("content-type", "").startswith("text/event-stream"):
        headers["openai-processing-ms"] = str(round(seconds * 1000))
