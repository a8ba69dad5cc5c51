"""HTTP whose replies must come by a set time, from the first byte of their headers to the last of their body.

A socket's timeout begins anew with every byte, so a server that sends one now and then, of a header say, would hold the
thread that waits for it without end. Knows nothing of what is asked for and where.
"""

import http.client
import io
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any


class TimedHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """For an opener. `deadline` is of time.monotonic; a read that begins later raises TimeoutError."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def do_open(self, http_class: Any, req: urllib.request.Request, **options: Any) -> http.client.HTTPResponse:
        return super().do_open(partial(_connection, http_class, self._deadline), req, **options)


def _connection(
    http_class: Callable[..., http.client.HTTPConnection], deadline: float, host: str, **options: Any
) -> http.client.HTTPConnection:
    made = http_class(host, **options)
    made.response_class = partial(_Reply, deadline)  # type: ignore[assignment]  # it is only called
    return made


class _Reply(http.client.HTTPResponse):
    def __init__(self, deadline: float, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fp = io.BufferedReader(_InTime(self.fp.detach(), deadline))


class _InTime(io.RawIOBase):
    """A socket's file, read until the deadline."""

    def __init__(self, file: io.RawIOBase, deadline: float) -> None:
        self._file = file
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self._deadline:
            raise TimeoutError
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()
