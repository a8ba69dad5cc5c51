"""What a thread team runs: a C function of the address of its arguments and the number of a chunk.

Compiled by numba, with machine code kept on disk. Knows no team.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numba
from numba import types
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target

_SIGNATURE: Any = types.void(types.int64, types.int64)

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

    @property
    def is_missing_on_disk(self) -> bool:
        """Whether the disk has no machine code of it for this processor, and would keep it once it is compiled."""
        try:
            cache: Any = FunctionCache(self._function)  # type: ignore[no-untyped-call]
        except RuntimeError:  # no writable folder for the cache
            return False
        return cache._index_key(_SIGNATURE, cpu_target.target_context.codegen()) not in cache._cache_file._load_index()

    @cached_property
    def _compiled(self) -> Any:  # held, since the address is of its code
        try:
            return numba.cfunc(_SIGNATURE, cache=True, **self._options)(self._function)
        except RuntimeError:  # no writable folder for the cache: compile in every process
            return numba.cfunc(_SIGNATURE, **self._options)(self._function)


def chunk_kernel(**options: Any) -> Callable[[Callable[..., None]], ChunkKernel]:
    """Make a function a ChunkKernel; `options` are numba's."""
    return lambda function: ChunkKernel(function, options)
