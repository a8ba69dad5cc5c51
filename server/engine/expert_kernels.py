"""Products of rows with the weights of the experts they were routed to, for processors with AVX512-BF16.

Weights lie in panels, expert by expert, and each expert's rows pass as those of a linear do (product_kernels.py): every
sum in one chain over the inputs, so that a row's bits do not depend on who else was routed to its expert. Knows neither
routing nor adapters. Called only where `bf16_dot.is_supported`.
"""

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from adapters.ops.bf16 import pointer
from adapters.ops.bf16_tile import MAX_PANELS, MAX_ROWS, WIDTH, multiply_packed, multiply_packed_float32
from adapters.ops.chunk_kernel import chunk_kernel

# Fields of the int64 arguments. Strides are in bytes; GROUPS is the address of int64 [num_groups, GROUP].
X, X_STRIDE, Y, Y_STRIDE, WEIGHT, BIAS, BIAS_STRIDE, NUM_STEPS, NUM_PANELS, GROUPS, NUM_FIELDS = range(11)
EXPERT, BEGIN, END, GROUP = range(4)  # rows [BEGIN, END) are the expert's
PANELS_PER_CHUNK = MAX_PANELS

_BYTES_PER_STEP = WIDTH * 4  # of a panel: a pair of bfloat16 inputs, or one input of float32


@njit(error_model="numpy", boundscheck=False)
def _chunk(fields, chunk, element_bytes):  # type: ignore[no-untyped-def]
    """A group's rows and up to PANELS_PER_CHUNK panels: their numbers, and where x, y, weight and bias begin."""
    chunks = -(-fields[NUM_PANELS] // PANELS_PER_CHUNK)
    number, panel = chunk // chunks, chunk % chunks * PANELS_PER_CHUNK
    group = carray(pointer(fields[GROUPS] + 8 * GROUP * number), GROUP, np.int64)
    begin, num_rows = group[BEGIN], group[END] - group[BEGIN]
    num_panels = min(PANELS_PER_CHUNK, fields[NUM_PANELS] - panel)
    x, y = fields[X] + begin * fields[X_STRIDE], fields[Y] + begin * fields[Y_STRIDE] + panel * WIDTH * element_bytes
    weight = fields[WEIGHT] + (group[EXPERT] * fields[NUM_PANELS] + panel) * fields[NUM_STEPS] * _BYTES_PER_STEP
    bias = fields[BIAS] + group[EXPERT] * fields[BIAS_STRIDE] + panel * WIDTH * 4
    return num_rows, num_panels, x, y, weight, bias


@njit(error_model="numpy", boundscheck=False)
def _at_once(num_rows, num_panels):  # type: ignore[no-untyped-def]
    """How many panels to multiply at once (bf16_tile.panels_at_once), of those that are left."""
    if num_rows <= 3 and num_panels >= 4:
        return 4
    return 2 if num_rows <= 6 and num_panels >= 2 else 1


@chunk_kernel(error_model="numpy", boundscheck=False)
def product_bfloat16(arguments, chunk):  # type: ignore[no-untyped-def]
    fields = carray(pointer(arguments), NUM_FIELDS, np.int64)
    num_rows, num_panels, x, y, weight, bias = _chunk(fields, chunk, 2)
    x_stride, y_stride, steps = fields[X_STRIDE], fields[Y_STRIDE], fields[NUM_STEPS]
    while num_panels > 0:
        at_once = _at_once(num_rows, num_panels)
        size = at_once * steps * _BYTES_PER_STEP
        for begin in range(0, num_rows, MAX_ROWS):
            count, x_row, y_row = min(MAX_ROWS, num_rows - begin), x + begin * x_stride, y + begin * y_stride
            multiply_packed(count, at_once, x_row, x_stride, weight, steps, bias, y_row, y_stride, size)
        num_panels, weight = num_panels - at_once, weight + size
        bias, y = bias + at_once * WIDTH * 4, y + at_once * WIDTH * 2


@chunk_kernel(error_model="numpy", boundscheck=False)
def product_float32(arguments, chunk):  # type: ignore[no-untyped-def]
    fields = carray(pointer(arguments), NUM_FIELDS, np.int64)
    num_rows, num_panels, x, y, weight, bias = _chunk(fields, chunk, 4)
    x_stride, y_stride, steps = fields[X_STRIDE], fields[Y_STRIDE], fields[NUM_STEPS]
    while num_panels > 0:
        at_once = _at_once(num_rows, num_panels)
        size = at_once * steps * _BYTES_PER_STEP
        for begin in range(0, num_rows, MAX_ROWS):
            count, x_row, y_row = min(MAX_ROWS, num_rows - begin), x + begin * x_stride, y + begin * y_stride
            multiply_packed_float32(count, at_once, x_row, x_stride, weight, steps, bias, y_row, y_stride, size)
        num_panels, weight = num_panels - at_once, weight + size
        bias, y = bias + at_once * WIDTH * 4, y + at_once * WIDTH * 4
