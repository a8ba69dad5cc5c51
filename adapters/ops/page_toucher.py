"""Has the system hand over the memory of large empty tensors before somebody has to wait for it.

A page that nobody wrote to is not there yet; the first writer of one waits some 10 µs on a virtual machine, 40 ms for
an adapter of 10 MB. A thread writes a word of each page again, indivisibly, so that whoever writes there at the same
time loses nothing. Knows no adapters.
"""

import mmap
import threading
from collections.abc import Sequence

from numba import types
from torch import Tensor

from adapters.ops.atomics import rewrite
from adapters.ops.numba_kernels import entry_point, kernel


@kernel()
def _touch(begin, end, page):  # type: ignore[no-untyped-def]
    for address in range(begin, end - 7, page):
        rewrite(address)


_run = entry_point(_touch, (types.int64,) * 3)


def touch_in_background(tensors: Sequence[Tensor]) -> threading.Thread:
    """A thread that touches every page of contiguous `tensors`, without the interpreter's lock, and ends."""

    def touch() -> None:
        for tensor in tensors:
            begin = -(-tensor.data_ptr() // 8) * 8
            _run(begin, tensor.data_ptr() + tensor.nbytes, mmap.PAGESIZE)

    thread = threading.Thread(target=touch, name="pages", daemon=True)
    thread.start()
    return thread
