"""Up to 12 rows of bfloat16 times a matrix 32 columns wide, the inner loop of every product we compute ourselves.

The instruction VDPBF16PS multiplies 16 pairs of bfloat16 and adds each pair to one of 16 float32 sums. 12 rows of two
registers of sums, two registers of weights and one of x fill the 32 registers there are; the weights stream past once
for all rows. Every sum runs over the pairs in order, in one chain, however many rows there are: a row's result never
depends on the rows beside it. numba has no such instruction, so the loop is written in LLVM's terms. Only where
`bf16_dot.is_supported`.
"""

from collections.abc import Callable
from typing import Any

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from adapters.ops.bf16_dot import PAIRS, BFloat, declare, declare_dot, is_supported

WIDTH = 32
"""Columns: two registers of 16 float32 sums."""

MAX_ROWS = 12

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_SUMS = ir.VectorType(ir.FloatType(), 16)
_LANES = ir.VectorType(_I32, 16)
_NARROW = ir.VectorType(BFloat(), 16)
_BITS = ir.VectorType(_I16, 16)
_ROW = ir.VectorType(_I16, WIDTH)
_HALVES = WIDTH // 16
_intrinsic: Any = numba.extending.intrinsic

Emit = Callable[..., Any]


@_intrinsic
def multiply_packed(
    _typing: Any, num_rows: Any, x: Any, x_stride: Any, weight: Any, num_pairs: Any, bias: Any, y: Any, y_stride: Any
) -> Any:
    """y[r] = bias + Σ_p x[r, pair p] · weight[p] for 1 to 12 rows; bias is float32, weight [num_pairs, 32, 2] bfloat16.

    All are addresses, the strides in bytes.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        num_rows, x, x_stride, weight, num_pairs, bias, y, y_stride = args

        def start(_y: Any) -> list[Any]:
            return [_load(builder, _at(builder, bias, _SUMS), half, align=4) for half in range(_HALVES)]

        def weights(pair: Any) -> list[Any]:
            first = builder.mul(pair, ir.Constant(_I64, _HALVES))
            panel = _at(builder, weight, _LANES)
            return [
                builder.bitcast(_load(builder, panel, builder.add(first, ir.Constant(_I64, half)), align=64), PAIRS)
                for half in range(_HALVES)
            ]

        _for_any_count(
            builder, num_rows, lambda count: _emit(builder, count, x, x_stride, num_pairs, y, y_stride, start, weights)
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@_intrinsic
def add_product(
    _typing: Any,
    num_rows: Any,
    x: Any,
    x_stride: Any,
    rows: Any,
    row_stride: Any,
    num_pairs: Any,
    y: Any,
    y_stride: Any,
) -> Any:
    """y[r] += Σ_p x[r, 2p] · rows[2p] + x[r, 2p + 1] · rows[2p + 1] for 1 to 12 rows, rounded once.

    `rows` is [2 · num_pairs, 32]. All are addresses, the strides in bytes.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        num_rows, x, x_stride, rows, row_stride, num_pairs, y, y_stride = args

        def start(out: Any) -> list[Any]:
            return [_widen(builder, _load(builder, _at(builder, out, _BITS), half, align=2)) for half in range(_HALVES)]

        def weights(pair: Any) -> list[Any]:
            first = builder.add(rows, builder.mul(builder.mul(pair, ir.Constant(_I64, 2)), row_stride))
            even = _load(builder, _at(builder, first, _ROW), 0, align=2)
            odd = _load(builder, _at(builder, builder.add(first, row_stride), _ROW), 0, align=2)
            return [builder.bitcast(_interleave(builder, even, odd, half), PAIRS) for half in range(_HALVES)]

        _for_any_count(
            builder, num_rows, lambda count: _emit(builder, count, x, x_stride, num_pairs, y, y_stride, start, weights)
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


def _for_any_count(builder: Any, num_rows: Any, emit: Callable[[int], None]) -> None:
    """The code of `emit` for each number of rows, and the choice between them."""
    end = builder.append_basic_block("rows.end")
    switch = builder.switch(num_rows, end)
    for count in range(1, MAX_ROWS + 1) if is_supported() else ():
        block = builder.append_basic_block(f"rows.{count}")
        switch.add_case(ir.Constant(_I64, count), block)
        builder.position_at_end(block)
        emit(count)
        builder.branch(end)
    builder.position_at_end(end)


def _emit(
    builder: Any, count: int, x: Any, x_stride: Any, num_pairs: Any, y: Any, y_stride: Any, start: Emit, weights: Emit
) -> None:
    """The loop over pairs for `count` rows from the sums `start(y)`, and the stores after it."""
    x_rows = [_at(builder, _row(builder, x, x_stride, r), _I32) for r in range(count)]
    y_rows = [_row(builder, y, y_stride, r) for r in range(count)]
    starts = [start(out) for out in y_rows]
    before, loop, after = builder.block, builder.append_basic_block("pairs"), builder.append_basic_block("pairs.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(_I64)
    sums = [[builder.phi(_SUMS) for _ in range(_HALVES)] for _ in range(count)]
    here, dot = weights(pair), declare_dot(builder)
    added = []
    for r in range(count):
        spread = builder.bitcast(_spread(builder, _load(builder, x_rows[r], pair, align=2)), PAIRS)
        added.append([builder.call(dot, [sums[r][half], spread, here[half]]) for half in range(_HALVES)])
    following = builder.add(pair, ir.Constant(_I64, 1))
    builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, after)
    pair.add_incoming(ir.Constant(_I64, 0), before)
    pair.add_incoming(following, loop)
    for r in range(count):
        for half in range(_HALVES):
            sums[r][half].add_incoming(starts[r][half], before)
            sums[r][half].add_incoming(added[r][half], loop)
    builder.position_at_end(after)
    narrow = declare(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.FunctionType(_NARROW, [_SUMS]))
    for r in range(count):
        out = _at(builder, y_rows[r], _NARROW)
        for half in range(_HALVES):
            rounded = builder.call(narrow, [added[r][half]])
            builder.store(rounded, builder.gep(out, [ir.Constant(_I64, half)]), align=2)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _row(builder: Any, address: Any, stride: Any, number: int) -> Any:
    return builder.add(address, builder.mul(ir.Constant(_I64, number), stride))


def _load(builder: Any, array: Any, index: Any, *, align: int) -> Any:
    index = ir.Constant(_I64, index) if isinstance(index, int) else index
    return builder.load(builder.gep(array, [index]), align=align)


def _spread(builder: Any, element: Any) -> Any:
    """One pair of x in all 16 lanes."""
    undefined = ir.Constant(_LANES, ir.Undefined)
    single = builder.insert_element(undefined, element, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, undefined, ir.Constant(_LANES, [0] * 16))


def _interleave(builder: Any, even: Any, odd: Any, half: int) -> Any:
    """Elements [16 · half, 16 · half + 16) of both rows, side by side in pairs."""
    lanes = [lane for column in range(16 * half, 16 * half + 16) for lane in (column, WIDTH + column)]
    return builder.shuffle_vector(even, odd, ir.Constant(ir.VectorType(_I32, WIDTH), lanes))


def _widen(builder: Any, bits: Any) -> Any:
    """bfloat16 bits as float32: they are its upper half."""
    sixteen = ir.Constant(_LANES, [16] * 16)
    return builder.bitcast(builder.shl(builder.zext(bits, _LANES), sixteen), _SUMS)
