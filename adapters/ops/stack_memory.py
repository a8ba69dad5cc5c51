"""Memory that a numba function has until it returns, for which malloc takes too long. Knows nothing of its use."""

from typing import Any

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

_intrinsic: Any = numba.extending.intrinsic
_LINE = 64


@_intrinsic
def stack_memory(_typing: Any, num_bytes: Any) -> Any:
    """The address of so many bytes in the frame of the calling function, as whatever was there left them.

    Only that function and those it calls may use them. Kilobytes, not megabytes, and not in a loop: the stack is small.
    """

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        memory = builder.alloca(ir.IntType(8), size=args[0])
        memory.align = _LINE
        return builder.ptrtoint(memory, ir.IntType(64))

    return types.int64(types.int64), generate
