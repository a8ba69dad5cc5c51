"""The threads that read, check and store adapters, on a core that decoding leaves to them.

A helper of the thread team that a load pushes aside holds up every kernel call of a step until it has its core back, so
decoding with a core less is faster than decoding beside a load on all of them (docs/LOG.md).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from adapters.ops import lent_core

T = TypeVar("T")

NUM_THREADS = 2
"""Each may take as much memory as an adapter may have."""


def load_threads() -> ThreadPoolExecutor:
    """Threads that end with the last reference to it."""
    return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="load")


def on_lent_core(work: Callable[[], T]) -> T:
    """What `work` returns; meanwhile decoding does with a core less."""
    with lent_core():
        return work()
