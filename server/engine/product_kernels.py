"""The matrix product of few or many bfloat16 rows with a weight packed in panels, for processors with AVX512-BF16.

A panel is 32 output features wide and lies in memory as the inner loop (adapters/ops/bf16_tile.py) reads it: for every
pair of input features, the pairs of 32 weights. A batch of decode rows costs what reading the weights costs; a prompt
is computed at the speed of the instruction. Called only where `bf16_dot.is_supported`.
"""

import numpy as np
from numba.np.numpy_support import carray

from adapters.ops.bf16 import pointer
from adapters.ops.bf16_tile import MAX_ROWS, WIDTH, multiply_packed
from adapters.ops.thread_team import chunk_kernel

_BYTES_PER_PAIR = WIDTH * 2 * 2

# Fields of the int64 arguments of a product: first the input, then MODULE fields for each weight that it meets.
X, X_STRIDE, NUM_TOKENS, NUM_PAIRS, MODULES = range(5)
WEIGHT, BIAS, Y, OUT_FEATURES, END_CHUNK, MODULE = range(6)
_MAX_MODULES = 64
_NUM_FIELDS = MODULES + _MAX_MODULES * MODULE


@chunk_kernel(error_model="numpy", boundscheck=False)
def _product(arguments, chunk):  # type: ignore[no-untyped-def]
    """One panel of one of the modules, for all rows."""
    fields = carray(pointer(arguments), _NUM_FIELDS, np.int64)
    module, first = MODULES, 0
    while chunk >= fields[module + END_CHUNK]:
        first = fields[module + END_CHUNK]
        module += MODULE
    panel = chunk - first
    num_pairs, x_stride, y_stride = fields[NUM_PAIRS], 2 * fields[X_STRIDE], 2 * fields[module + OUT_FEATURES]
    weight = fields[module + WEIGHT] + panel * num_pairs * _BYTES_PER_PAIR
    bias = fields[module + BIAS] + panel * WIDTH * 4
    y = fields[module + Y] + panel * WIDTH * 2
    for begin in range(0, fields[NUM_TOKENS], MAX_ROWS):
        count = min(MAX_ROWS, fields[NUM_TOKENS] - begin)
        x = fields[X] + begin * x_stride
        multiply_packed(count, x, x_stride, weight, num_pairs, bias, y + begin * y_stride, y_stride)


PRODUCT: int = _product.address
"""The chunk kernel: one chunk is one panel; arguments as the fields above say."""
