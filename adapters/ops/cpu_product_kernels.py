"""The numba kernel that multiplies a few rows by a large matrix: a stretch of it a chunk, read once for all rows.

Sums run over the inputs in one order, whatever rows there are. Needs AVX512-BF16; nothing is checked inside.
"""

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from adapters.ops.bf16 import pointer
from adapters.ops.bf16_dot import ROWS_AT_ONCE, dot_rows
from adapters.ops.chunk_kernel import chunk_kernel
from adapters.ops.numba_kernels import OPTIONS

(
    X,  # address of bfloat16 [NUM_X, IN_FEATURES], dense
    NUM_X,
    IN_FEATURES,  # a multiple of LANES
    WEIGHT,  # bfloat16 [NUM_OUT, IN_FEATURES], dense
    NUM_OUT,  # ROWS_AT_ONCE at least
    OUT,  # float32 [NUM_X, NUM_OUT], dense
    OUT_PER_CHUNK,
    NUM_FIELDS,
) = range(8)


@njit(**OPTIONS)
def _multiply(arguments: int, chunk: int) -> None:
    """The outputs of one chunk for all rows; the last ones are computed with those before when they are too few."""
    fields = carray(pointer(arguments), NUM_FIELDS, np.int64)
    row_bytes, num_out = 2 * fields[IN_FEATURES], fields[NUM_OUT]
    begin = chunk * fields[OUT_PER_CHUNK]
    for first in range(begin, min(begin + fields[OUT_PER_CHUNK], num_out), ROWS_AT_ONCE):
        first = min(first, num_out - ROWS_AT_ONCE)
        for row in range(fields[NUM_X]):
            dot_rows(
                fields[X] + row * row_bytes, fields[WEIGHT] + first * row_bytes, row_bytes, fields[IN_FEATURES],
                fields[OUT] + 4 * (row * num_out + first),
            )  # fmt: skip


@chunk_kernel(**OPTIONS)
def multiply_rows_bf16(arguments, chunk):  # type: ignore[no-untyped-def]
    _multiply(arguments, chunk)
