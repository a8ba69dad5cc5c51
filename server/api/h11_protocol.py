"""What HTTP itself refuses, answered in the shape of every other error: h11 turns a request away before there is one.

Knows nothing of routes: there is no path to look at. After the reply the rest of what the client sends is read and
dropped for a moment, since closing on unread bytes resets the connection, and the reply may be lost with it.
"""

import json
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.error_handlers import error_body

LINGER_SECONDS = 1.0


def h11_protocol(count_error: Callable[[int, str | None], None]) -> type[H11Protocol]:
    """The protocol class for `uvicorn.Config(http=…)`; `count_error(status, code)` is told of each refusal."""

    class CountingProtocol(JSONErrorProtocol):
        def send_400_response(self, msg: str) -> None:
            count_error(HTTPStatus.BAD_REQUEST, None)
            super().send_400_response(msg)

    return CountingProtocol


class JSONErrorProtocol(H11Protocol):
    """uvicorn's, with its plain-text 400 replaced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_refused = False

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """`msg`, uvicorn's, says less than ours."""
        self._is_refused = True
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a reply was begun or given: nothing to add
            self.transport.close()
            return
        self._send(json.dumps(error_body(self._message(), error_type="invalid_request_error")).encode())
        self._leave_application()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _message(self) -> str:
        limit = self.config.h11_max_incomplete_event_size
        return (
            f"This is not a valid HTTP request: its request line or a header is malformed, its headers are larger than "
            f"{limit} bytes, Host is missing or given twice, or its body does not end as announced."
        )

    def _send(self, body: bytes) -> None:
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", f"req_{uuid.uuid4().hex}".encode()),
            (b"connection", b"close"),
        ]
        status = HTTPStatus.BAD_REQUEST
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
        self.transport.write(self.conn.send(response))
        for event in (h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _leave_application(self) -> None:
        """Headers were fine and the body is not: the application that waits for it is told that it will not come."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
