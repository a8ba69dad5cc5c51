"""What a thread team runs: a C function of the address of its arguments and the number of a chunk.

Compiled by numba, with machine code kept on disk. Knows no team.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numba
from numba import types

Kernel = int
"""The address of a chunk function (`chunk_kernel`)."""


class ChunkKernel:
    """`f(arguments: int64, chunk: int64)`, compiled to a C function when it is first wanted: that takes seconds, and no
    model needs all of them."""

    def __init__(self, function: Callable[..., None], options: dict[str, Any]) -> None:
        self._function, self._options = function, options

    @cached_property
    def address(self) -> Kernel:
        """What a team runs."""
        return int(self._compiled.address)

    @cached_property
    def _compiled(self) -> Any:  # held, since the address is of its code
        signature = types.void(types.int64, types.int64)
        try:
            return numba.cfunc(signature, cache=True, **self._options)(self._function)
        except RuntimeError:  # no writable folder for the cache: compile in every process
            return numba.cfunc(signature, **self._options)(self._function)


def chunk_kernel(**options: Any) -> Callable[[Callable[..., None]], ChunkKernel]:
    """Make a function a ChunkKernel; `options` are numba's."""
    return lambda function: ChunkKernel(function, options)
