"""Progress of work in a thread, brought to the event loop. Knows nothing of the work."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

Progress = Callable[[int, int | None], None]
"""(done so far, in all or None while that is not known), called on the event loop."""

REPORT_EVERY = 0.1  # seconds


class ThreadReports:
    """Made on the loop, ten times a second and at each end; nothing is told any more once the context has ended.

    What `progress` raises is the loop's to log: the work goes on, and so it does when the loop has closed.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._next = 0.0
        self._is_over = False

    def from_thread(self, done: int, total: int | None) -> None:
        now = self._loop.time()
        if now < self._next and done != total:
            return
        self._next = now + REPORT_EVERY
        with suppress(RuntimeError):  # the loop has closed, and nobody listens
            self._loop.call_soon_threadsafe(self._report, done, total)

    def _report(self, done: int, total: int | None) -> None:
        if not self._is_over:
            self._progress(done, total)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
