"""The numba kernel of a gated MLP's activation: out = silu(gate) · up over flat bfloat16 arrays, in chunks."""

import numpy as np
from numba.np.numpy_support import carray

from adapters.ops.bf16 import narrow, pointer, widen
from adapters.ops.chunk_kernel import chunk_kernel
from server.engine.fast_exp import EXACT, exp

OUT, GATE, UP, SIZE, NUM_FIELDS = range(5)
_SMALLEST = np.float32(-87.0)  # below it e^x is no float32, and `exp` does not go down to 0
CHUNK = 4096
"""Elements of a chunk."""


@chunk_kernel(**EXACT)
def silu_times(arguments, chunk):  # type: ignore[no-untyped-def]
    """silu(x) = x / (1 + e^-x), by e^-|x| so that nothing overflows; rounded, then multiplied and rounded."""
    fields = carray(pointer(arguments), NUM_FIELDS, np.int64)
    begin = chunk * CHUNK
    size = min(np.int64(CHUNK), fields[SIZE] - begin)
    out = carray(pointer(fields[OUT] + 2 * begin), size, np.uint16)
    gate = carray(pointer(fields[GATE] + 2 * begin), size, np.uint16)
    up = carray(pointer(fields[UP] + 2 * begin), size, np.uint16)
    for i in range(size):
        x = widen(gate[i])
        e = exp(-abs(x)) if x > _SMALLEST else np.float32(0.0)
        sigmoid = (np.float32(1.0) if x >= 0 else e) / (np.float32(1.0) + e)
        out[i] = narrow(widen(narrow(x * sigmoid, out)) * widen(up[i]), out)
