"""A call of plain Python within a forward pass that works in place on tensors: what a recording plays back as it is.

Knows neither recordings nor what is called.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

HostFunction = Callable[..., None]
"""Reads and writes the tensors it is given, and whatever else stays where it is from step to step; makes none that
outlive it."""

Watcher = Callable[[HostFunction, tuple[Tensor, ...]], None]

_watching = threading.local()


def host_call(function: HostFunction, *tensors: Tensor) -> None:
    """Run `function(*tensors)`, or leave it to who watches."""
    watcher: Watcher | None = getattr(_watching, "watcher", None)
    if watcher is None:
        function(*tensors)
    else:
        watcher(function, tensors)


@contextmanager
def watched_host_calls(watcher: Watcher) -> Iterator[None]:
    """Hand every call that this thread makes inside to `watcher`, which is to run it."""
    assert getattr(_watching, "watcher", None) is None
    _watching.watcher = watcher
    try:
        yield
    finally:
        _watching.watcher = None
