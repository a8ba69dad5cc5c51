"""How numba kernels are compiled. Knows nothing of what they compute."""

from collections.abc import Callable
from typing import Any

import numba

OPTIONS: dict[str, Any] = {"fastmath": True, "nogil": True, "error_model": "numpy", "boundscheck": False}
"""How every kernel, and every function inlined into one, is compiled."""

INLINED: dict[str, Any] = {**OPTIONS, "inline": "always"}
"""For small functions on the hot path that take arrays: a call counts the owners of each array up and down again.
Not for one that works on addresses of an array its caller made: numba frees that after its last use by name."""


def kernel() -> Callable[[Callable[..., None]], Any]:
    """A kernel whose machine code is kept on disk, so that the next process compiles nothing.

    The cache sees changes of the kernel's own file only: after changing bf16.py touch the files that use it.
    """

    def compile_lazily(function: Callable[..., None]) -> Any:
        try:
            return numba.njit(cache=True, **OPTIONS)(function)
        except RuntimeError:  # no writable folder for the cache: compile in every process
            return numba.njit(**OPTIONS)(function)

    return compile_lazily


def entry_point(dispatcher: Any, signature: tuple[Any, ...]) -> Callable[..., None]:
    """The compiled function itself, which takes exactly the types of `signature` and resolves none at the call."""
    dispatcher.compile(signature)
    function: Callable[..., None] = dispatcher.overloads[signature].entry_point
    return function
