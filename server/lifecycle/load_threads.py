"""The threads that read, check and store adapters: two, and behind those who decode where cores are short."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

NUM_THREADS = 2
"""Each may take as much memory as an adapter may have."""
_NICENESS, _NICEST = 10, 19


def load_threads() -> ThreadPoolExecutor:
    """Threads that end with the last reference to it."""
    return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="load", initializer=_stand_back)


def _stand_back() -> None:
    """On Linux a thread has a niceness of its own. Elsewhere it is the process's, which stays as it is."""
    if os.uname().sysname == "Linux":
        with suppress(OSError):  # some sandboxes forbid it
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS, _NICEST))
