"""The numba kernel that multiplies a few rows by a large matrix: a stretch of it a chunk, read once for all rows.

Sums run over the inputs in one order, whatever rows there are. Needs AVX512-BF16; nothing is checked inside.
"""

from typing import Any

import numba.extending
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.np.numpy_support import carray

from adapters.ops.bf16 import pointer
from adapters.ops.bf16_dot import LANES, ROWS_AT_ONCE, declare, emit_dots, is_supported
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


_AHEAD = 12 << 10  # bytes: rows that lie one after the other are asked for so far before they are read
_LINE = 64
_intrinsic: Any = numba.extending.intrinsic


@_intrinsic
def _dot_dense_rows(_typing: Any, x: Any, rows: Any, stride: Any, length: Any, out: Any) -> Any:
    """`dot_rows` for rows without gaps, which asks meanwhile for those that come after them."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if is_supported():
            integer, byte = ir.IntType(64), ir.IntType(8).as_pointer()
            flags = [ir.IntType(32)(flag) for flag in (0, 2, 1)]  # to be read, soon but not at once, data
            signature = ir.FunctionType(ir.VoidType(), [byte, *[ir.IntType(32)] * 3])
            prefetch = declare(builder, "llvm.prefetch.p0", signature)

            def ask(step: Any) -> None:
                step_bytes = ROWS_AT_ONCE * LANES * 2
                at = builder.add(builder.add(args[1], integer(_AHEAD)), builder.mul(step, integer(step_bytes)))
                for line in range(0, step_bytes, _LINE):
                    builder.call(prefetch, [builder.inttoptr(builder.add(at, integer(line)), byte), *flags])

            emit_dots(builder, ask, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@njit(**OPTIONS)
def _multiply(arguments: int, chunk: int) -> None:
    """The outputs of one chunk for all rows; the last ones are computed with those before when they are too few."""
    fields = carray(pointer(arguments), NUM_FIELDS, np.int64)
    row_bytes, num_out = 2 * fields[IN_FEATURES], fields[NUM_OUT]
    begin = chunk * fields[OUT_PER_CHUNK]
    for first in range(begin, min(begin + fields[OUT_PER_CHUNK], num_out), ROWS_AT_ONCE):
        first = min(first, num_out - ROWS_AT_ONCE)
        for row in range(fields[NUM_X]):
            _dot_dense_rows(
                fields[X] + row * row_bytes, fields[WEIGHT] + first * row_bytes, row_bytes, fields[IN_FEATURES],
                fields[OUT] + 4 * (row * num_out + first),
            )  # fmt: skip


@chunk_kernel(**OPTIONS)
def multiply_rows_bf16(arguments, chunk):  # type: ignore[no-untyped-def]
    _multiply(arguments, chunk)
