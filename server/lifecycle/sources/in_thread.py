"""Blocking work in a worker thread, and what becomes of it when nobody waits for it any more.

A thread cannot be interrupted. `asyncio.to_thread` leaves it running when its caller is cancelled and drops what it
returns, be that an open folder; here it is either given to `discard`, or waited for. Knows nothing of adapters.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


async def in_thread(
    work: Callable[[], T],
    *,
    executor: Executor | None = None,
    discard: Callable[[T], object] | None = None,
    on_cancel: Callable[[], object] | None = None,
    wait_if_cancelled: bool = False,
) -> T:
    """What `work` returns, of a thread of `executor` or asyncio's own.

    Cancelled meanwhile: `on_cancel` is called at once; with `wait_if_cancelled` the cancellation is raised when the
    work has ended, otherwise at once, and what the work still returns goes to `discard`, in a thread.
    """
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(executor, copy_context().run, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if on_cancel is not None:
            on_cancel()
        if wait_if_cancelled:
            await _settled(future)
        else:
            future.add_done_callback(lambda done: _discard(done, discard, loop))
        raise


async def _settled(future: "asyncio.Future[T]") -> None:
    """Until it has ended, however often this is cancelled meanwhile; what it raised is nobody's any more."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()


def _discard(
    future: "asyncio.Future[T]", discard: Callable[[T], object] | None, loop: asyncio.AbstractEventLoop
) -> None:
    if future.cancelled() or future.exception() is not None or discard is None:
        return
    loop.run_in_executor(None, discard, future.result())
