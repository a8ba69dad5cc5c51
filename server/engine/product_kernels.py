"""The matrix product of few or many bfloat16 rows with a weight packed in panels, for processors with AVX512-BF16.

The instruction VDPBF16PS multiplies 16 pairs of bfloat16 and adds each pair to one of 16 float32 sums. A panel is 32
output features wide and lies in memory as the instruction reads it: for every pair of input features, the pairs of 32
weights. Up to 12 rows keep their sums in registers while a panel streams past once, so that a batch of decode rows
costs what reading the weights costs, and a prompt is computed at the speed of the instruction.

Every sum runs over the input features in order, in one chain, however many rows there are: a row's result never depends
on the rows beside it. numba has no such instruction, so the inner loop is written in LLVM's terms. Imported only where
`product_is_supported`.
"""

from typing import Any

import numba
import numba.extending
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.np.numpy_support import carray

from adapters.ops.bf16 import pointer
from adapters.ops.bf16_dot import PAIRS, BFloat, declare, declare_dot
from adapters.ops.thread_team import chunk_kernel

PANEL = 32
"""Output features of a panel: two registers of 16 float32 sums."""
_MAX_ROWS = 12  # 12 rows x 2 registers of sums, 2 of weights and 1 of x fill the 32 there are
_BYTES_PER_PAIR = PANEL * 2 * 2

# Fields of the int64 arguments of a product: first the input, then MODULE fields for each weight that it meets.
X, X_STRIDE, NUM_PAIRS, NUM_TOKENS, MODULES = range(5)
WEIGHT, BIAS, Y, OUT_FEATURES, END_CHUNK, MODULE = range(6)
_MAX_MODULES = 64
_NUM_FIELDS = MODULES + _MAX_MODULES * MODULE


_I32, _I64 = ir.IntType(32), ir.IntType(64)
_SUMS = ir.VectorType(ir.FloatType(), 16)
_LANES = ir.VectorType(_I32, 16)
_NARROW = ir.VectorType(BFloat(), 16)
_HALVES = PANEL // 16
_intrinsic: Any = numba.extending.intrinsic


@_intrinsic
def _multiply_rows(
    _typing: Any, num_rows: Any, x: Any, x_stride: Any, weight: Any, num_pairs: Any, bias: Any, y: Any, y_stride: Any
) -> Any:
    """y[r] = x[r] · panelᵀ + bias for 1 to 12 rows: addresses, strides in bytes."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        end = builder.append_basic_block("rows.end")
        switch = builder.switch(args[0], end)
        for count in range(1, _MAX_ROWS + 1):
            block = builder.append_basic_block(f"rows.{count}")
            switch.add_case(ir.Constant(_I64, count), block)
            builder.position_at_end(block)
            _emit_rows(builder, count, *args[1:])
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


def _emit_rows(
    builder: Any, count: int, x: Any, x_stride: Any, weight: Any, num_pairs: Any, bias: Any, y: Any, y_stride: Any
) -> None:
    """The loop over pairs of input features for `count` rows, and the stores after it."""

    def at(address: Any, kind: Any) -> Any:
        return builder.inttoptr(address, kind.as_pointer())

    def row(address: Any, stride: Any, number: int) -> Any:
        return builder.add(address, builder.mul(ir.Constant(_I64, number), stride))

    x_rows = [at(row(x, x_stride, r), _I32) for r in range(count)]
    panel = at(weight, _LANES)
    start = [_load(builder, at(bias, _SUMS), ir.Constant(_I64, half), align=4) for half in range(_HALVES)]
    before, loop, after = builder.block, builder.append_basic_block("pairs"), builder.append_basic_block("pairs.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(_I64)
    sums = [[builder.phi(_SUMS) for _ in range(_HALVES)] for _ in range(count)]
    first = builder.mul(pair, ir.Constant(_I64, _HALVES))
    weights = [
        builder.bitcast(_load(builder, panel, builder.add(first, ir.Constant(_I64, half)), align=64), PAIRS)
        for half in range(_HALVES)
    ]
    dot = declare_dot(builder)
    added = []
    for r in range(count):
        spread = builder.bitcast(_spread(builder, _load(builder, x_rows[r], pair, align=2)), PAIRS)
        added.append([builder.call(dot, [sums[r][half], spread, weights[half]]) for half in range(_HALVES)])
    next_pair = builder.add(pair, ir.Constant(_I64, 1))
    builder.cbranch(builder.icmp_signed("<", next_pair, num_pairs), loop, after)
    pair.add_incoming(ir.Constant(_I64, 0), before)
    pair.add_incoming(next_pair, loop)
    for r in range(count):
        for half in range(_HALVES):
            sums[r][half].add_incoming(start[half], before)
            sums[r][half].add_incoming(added[r][half], loop)
    builder.position_at_end(after)
    narrow = declare(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.FunctionType(_NARROW, [_SUMS]))
    for r in range(count):
        out = at(row(y, y_stride, r), _NARROW)
        for half in range(_HALVES):
            rounded = builder.call(narrow, [added[r][half]])
            builder.store(rounded, builder.gep(out, [ir.Constant(_I64, half)]), align=2)


def _load(builder: Any, array: Any, index: Any, *, align: int) -> Any:
    return builder.load(builder.gep(array, [index]), align=align)


def _spread(builder: Any, element: Any) -> Any:
    """One pair of x in all 16 lanes."""
    undefined = ir.Constant(_LANES, ir.Undefined)
    single = builder.insert_element(undefined, element, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, undefined, ir.Constant(_LANES, [0] * 16))


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
    bias = fields[module + BIAS] + panel * PANEL * 4
    y = fields[module + Y] + panel * PANEL * 2
    for begin in range(0, fields[NUM_TOKENS], _MAX_ROWS):
        count = min(_MAX_ROWS, fields[NUM_TOKENS] - begin)
        x = fields[X] + begin * x_stride
        _multiply_rows(count, x, x_stride, weight, num_pairs, bias, y + begin * y_stride, y_stride)


PRODUCT: int = _product.address
"""The chunk kernel: one chunk is one panel; arguments as the fields above say."""
