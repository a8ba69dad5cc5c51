"""Server-sent events for both routes: `data: {json}` chunks, then `data: [DONE]`, or one error event and no [DONE].

Knows nothing of what the chunks say; it is given each as an event. The response watches its client from the first
moment: gone, or not reading for `STALL_SECONDS`, and the work behind it is closed at once.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping

from fastapi.sse import format_sse_event
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.disconnect import ClientGone, run_while_connected
from server.api.error_handlers import INTERNAL_ERROR_MESSAGE, error_body, server_error_body
from server.api.event import event
from server.errors import ServerError

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0  # a comment when nothing was sent for so long, lest a proxy gives up on a queued request
STALL_SECONDS = 30.0  # a client that does not read for so long is gone

CountError = Callable[[int, str | None], None]
"""Counts one error by status and code."""

_DONE = format_sse_event(data_str="[DONE]")
_KEEP_ALIVE = format_sse_event(comment="keep-alive")
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class SSEResponse(StreamingResponse):
    """Streams `events`; calls `close` exactly when the response is over, however it ends, even if it never began."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        close: Callable[[], None],
        count_error: CountError,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(_to_the_end(events, count_error), headers={**_HEADERS, **headers})
        self._close = close
        self._last_sent: float | None = None  # None: not begun, or over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_while_connected(receive, self._stream(send))
        except (ClientGone, TimeoutError, OSError):
            logger.info("a client left its stream before the end")
        finally:
            self._close()

    async def _stream(self, send: Send) -> None:
        keeping_alive = asyncio.create_task(self._keep_alive(send))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._last_sent = time.monotonic()
            async for chunk in self.body_iterator:
                async with asyncio.timeout(STALL_SECONDS):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._last_sent = time.monotonic()
            self._last_sent = None
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            keeping_alive.cancel()

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            if self._last_sent is not None and time.monotonic() - self._last_sent >= KEEP_ALIVE_SECONDS:
                await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})


async def _to_the_end(events: AsyncIterator[bytes], count_error: CountError) -> AsyncIterator[bytes]:
    """An error is counted under the status it would have had, had the reply not begun with 200."""
    try:
        async for each in events:
            yield each
    except ServerError as error:
        count_error(error.status, error.code)
        yield event(server_error_body(error))
    except Exception:
        logger.exception("a stream failed")
        count_error(500, "internal_error")
        yield event(error_body(INTERNAL_ERROR_MESSAGE, error_type="server_error", code="internal_error"))
    else:
        yield _DONE
