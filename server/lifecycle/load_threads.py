"""The threads that read, check and store adapters: two, behind those who decode where cores are short.

A helper of the thread team that is pushed aside by a load holds up every kernel call of a step until it comes back, so
decoding with a core less is faster than decoding beside a load on all of them (docs/LOG.md).
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from adapters.ops import lent_core

T = TypeVar("T")

NUM_THREADS = 2
"""Each may take as much memory as an adapter may have."""
_NICENESS, _NICEST = 10, 19


def load_threads() -> ThreadPoolExecutor:
    """Threads that end with the last reference to it."""
    return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="load", initializer=_stand_back)


def on_lent_core(work: Callable[[], T]) -> T:
    """What `work` returns; meanwhile decoding does with a core less."""
    with lent_core():
        return work()


def _stand_back() -> None:
    """On Linux a thread has a niceness of its own. Elsewhere it is the process's, which stays as it is."""
    if os.uname().sysname == "Linux":
        with suppress(OSError):  # some sandboxes forbid it
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS, _NICEST))
