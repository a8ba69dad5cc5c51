"""The matrix product of few or many bfloat16 rows with a weight packed in panels, for processors with AVX512-BF16.

A panel is 32 output features wide and lies in memory as the inner loop (adapters/ops/bf16_tile.py) reads it: for every
pair of input features, the pairs of 32 weights. A batch of decode rows costs what reading the weights costs; a prompt
is computed at the speed of the instruction. Called only where `bf16_dot.is_supported`.
"""

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from adapters.ops.bf16 import pointer
from adapters.ops.bf16_tile import MAX_ROWS, WIDTH, multiply_packed
from adapters.ops.chunk_kernel import chunk_kernel

_BYTES_PER_PAIR = WIDTH * 2 * 2

# Fields of the int64 arguments of a product: first the input, then MODULE fields for each weight that it meets.
X, X_STRIDE, NUM_TOKENS, PANELS, NUM_PAIRS, NUM_THREADS, MODULES = range(7)  # PANELS: of a chunk
WEIGHT, BIAS, Y, OUT_FEATURES, MODULE = range(5)
_MAX_MODULES = 64
_NUM_FIELDS = MODULES + _MAX_MODULES * MODULE


@njit(error_model="numpy", boundscheck=False)
def _multiply_rows(fields, at_once, weight, bias, y, y_stride, following):  # type: ignore[no-untyped-def]
    """All rows with as many panels at once."""
    x_stride = 2 * fields[X_STRIDE]
    for begin in range(0, fields[NUM_TOKENS], MAX_ROWS):
        count = min(MAX_ROWS, fields[NUM_TOKENS] - begin)
        x = fields[X] + begin * x_stride
        multiply_packed(
            count, at_once, x, x_stride, weight, fields[NUM_PAIRS], bias, y + begin * y_stride, y_stride, following
        )


@chunk_kernel(error_model="numpy", boundscheck=False)
def product(arguments, chunk):  # type: ignore[no-untyped-def]
    """PANELS panels of one of the modules, or the fewer at its end, for all rows."""
    fields = carray(pointer(arguments), _NUM_FIELDS, np.int64)
    at_once = fields[PANELS]
    module, panel = MODULES, chunk * at_once
    while panel * WIDTH >= fields[module + OUT_FEATURES]:
        panel -= -(-fields[module + OUT_FEATURES] // (WIDTH * at_once)) * at_once
        module += MODULE
    num_panels = fields[module + OUT_FEATURES] // WIDTH
    end = min(panel + at_once, num_panels)
    panel_bytes = fields[NUM_PAIRS] * _BYTES_PER_PAIR
    # A thread's next chunk is likely the one after those that the other threads have in hand.
    following = fields[NUM_THREADS] * at_once * panel_bytes
    while panel < end:
        while panel + at_once > end:
            at_once //= 2
        weight = fields[module + WEIGHT] + panel * panel_bytes
        bias, y = fields[module + BIAS] + panel * WIDTH * 4, fields[module + Y] + panel * WIDTH * 2
        y_stride = 2 * fields[module + OUT_FEATURES]
        _multiply_rows(fields, at_once, weight, bias, y, y_stride, following)
        panel += at_once
