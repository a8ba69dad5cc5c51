"""How numba kernels are compiled and on which threads they run. Knows nothing of what they compute.

Threads: numba's "omp" layer resolves OpenMP to the library torch loaded before it, so both draw on one pool; any other
layer would spin a second pool against torch's on the same cores. Without OpenMP the kernels run on one thread.
"""

import importlib
import threading
from collections.abc import Callable
from typing import Any

import numba
import torch

OPTIONS: dict[str, Any] = {"fastmath": True, "nogil": True, "error_model": "numpy", "boundscheck": False}
"""How every kernel, and every function inlined into one, is compiled."""


def kernel(*, parallel: bool = False) -> Callable[[Callable[..., None]], Any]:
    """A kernel whose machine code is kept on disk, so that the next process compiles nothing.

    The cache sees changes of the kernel's own file only: after changing bf16.py touch the files that use it.
    """

    def compile_lazily(function: Callable[..., None]) -> Any:
        try:
            return numba.njit(cache=True, parallel=parallel, **OPTIONS)(function)
        except RuntimeError:  # no writable folder for the cache: compile in every process
            return numba.njit(parallel=parallel, **OPTIONS)(function)

    return compile_lazily


def entry_point(dispatcher: Any, signature: tuple[Any, ...]) -> Callable[..., None]:
    """The compiled function itself, which takes exactly the types of `signature` and resolves none at the call."""
    dispatcher.compile(signature)
    function: Callable[..., None] = dispatcher.overloads[signature].entry_point
    return function


class _CallingThread(threading.local):
    num_threads: int | None = None


_calling_thread = _CallingThread()


def available_threads() -> int:
    """How many threads parallel kernels may use: torch's number, or 1 where OpenMP is missing."""
    config: Any = numba.config  # its names are made when numba is imported
    wanted = torch.get_num_threads()
    num_threads = min(wanted, int(config.NUMBA_NUM_THREADS))
    if num_threads == 1 or not _has_openmp():
        return 1
    if str(config.THREADING_LAYER) == "default":
        config.THREADING_LAYER = "omp"
    use_threads(num_threads)
    torch.set_num_threads(wanted)  # starting the layer wrote numba's own count into the pool it shares with torch
    return num_threads


def use_threads(num_threads: int) -> None:
    """Let the next parallel kernels called from this thread use `num_threads`; numba keeps the number per thread."""
    if _calling_thread.num_threads != num_threads:
        numba.set_num_threads(num_threads)
        _calling_thread.num_threads = num_threads


def _has_openmp() -> bool:
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:  # no libgomp on the machine
        return False
    return True
