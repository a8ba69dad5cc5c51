"""A row against a few rows that come from memory, what comes after them asked for meanwhile (look_ahead.py).

Written in LLVM's terms, because a request for memory in a loop keeps numba from making vectors of it. Knows nothing of
LoRA.
"""

from collections.abc import Sequence
from typing import Any

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from adapters.ops.bf16_dot import LANES, ROWS_AT_ONCE, declare, emit_dots, is_supported
from adapters.ops.look_ahead import asking

COLUMNS = 32
"""Columns that are added at once."""

_HALF = 16  # float32 in a register
_intrinsic: Any = numba.extending.intrinsic
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT = ir.FloatType()
_SUMS, _BITS, _LANES = (ir.VectorType(kind, _HALF) for kind in (_FLOAT, _I16, _I32))


@_intrinsic
def dot_streamed_rows(_typing: Any, x: Any, rows: Any, stride: Any, length: Any, out: Any, plan: Any) -> Any:
    """`dot_rows`, which asks meanwhile for what was taken from the plan. `plan` is its address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if is_supported():
            *rest, plan = args
            ask, step_bytes = asking(builder, plan), ROWS_AT_ONCE * LANES * 2
            emit_dots(builder, lambda step: ask(builder.mul(step, _I64(step_bytes)), step_bytes), *rest)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@_intrinsic
def add_streamed_rows(
    _typing: Any,
    kind: Any,
    num_rows: Any,
    scales: Any,
    rows: Any,
    stride: Any,
    num_columns: Any,
    y: Any,
    total: Any,
    is_first: Any,
    is_last: Any,
    plan: Any,
) -> Any:
    """total += Σ_r scales[r] · rows[r] for 1 to ROWS_AT_ONCE rows, in float32.

    The first call starts from y instead of `total`, the last leaves the sums there, rounded. Meanwhile it asks for what
    was taken from the plan. `kind` is an array of the dtype of y and the rows; the rest are addresses, the stride in
    bytes, and the number of columns is a positive multiple of COLUMNS.
    """
    is_bf16 = kind.dtype == types.uint16

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _kind, num_rows, *rest = args
        end = builder.append_basic_block("rows.end")
        switch = builder.switch(num_rows, end)
        for count in range(1, ROWS_AT_ONCE + 1):
            block = builder.append_basic_block(f"rows.{count}")
            switch.add_case(_I64(count), block)
            builder.position_at_end(block)
            _emit_sum(builder, count, is_bf16, *rest)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    integers, flags = [types.int64] * 7, [types.boolean] * 2
    return types.void(kind, *integers, *flags, types.int64), generate


def _emit_sum(
    builder: Any,
    num_rows: int,
    is_bf16: bool,
    scales: Any,
    rows: Any,
    stride: Any,
    num_columns: Any,
    y: Any,
    total: Any,
    is_first: Any,
    is_last: Any,
    plan: Any,
) -> None:
    """The loop over columns, for so many rows."""
    factors = [_spread(builder, scales, r) for r in range(num_rows)]
    row_at = [builder.add(rows, builder.mul(stride, _I64(r))) for r in range(num_rows)]
    ask, size = asking(builder, plan), 2 if is_bf16 else 4
    fma = declare(builder, "llvm.fmuladd.v16f32", ir.FunctionType(_SUMS, [_SUMS] * 3))
    before, loop, after = builder.block, builder.append_basic_block("add"), builder.append_basic_block("add.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    column = builder.phi(_I64)
    offset = builder.mul(column, _I64(size))
    taken, part_bytes = builder.mul(offset, _I64(num_rows)), num_rows * COLUMNS * 2  # no more than a unit
    for part in range(size // 2):
        ask(builder.add(taken, _I64(part * part_bytes)), part_bytes)
    y_at, total_at = builder.add(y, offset), builder.add(total, builder.mul(column, _I64(4)))
    sums = _start(builder, is_first, is_bf16, y_at, total_at)
    for r in range(num_rows):
        row = _load(builder, builder.add(row_at[r], offset), is_bf16)
        sums = [builder.call(fma, [factors[r], *pair]) for pair in zip(row, sums, strict=True)]
    with builder.if_else(is_last) as (last, other):
        with last:
            _store(builder, sums, y_at, is_bf16)
        with other:
            _store(builder, sums, total_at, False)
    following = builder.add(column, _I64(COLUMNS))
    column.add_incoming(_I64(0), before)
    column.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, num_columns), loop, after)
    builder.position_at_end(after)


def _start(builder: Any, is_first: Any, is_bf16: bool, y: Any, total: Any) -> list[Any]:
    """The sums so far: y at first, then `total`."""
    with builder.if_else(is_first) as (first, other):
        with first:
            of_y, after_y = _load(builder, y, is_bf16), builder.block
        with other:
            of_total, after_total = _load(builder, total, False), builder.block
    sums = [builder.phi(_SUMS) for _ in of_y]
    for each, here, there in zip(sums, of_y, of_total, strict=True):
        each.add_incoming(here, after_y)
        each.add_incoming(there, after_total)
    return sums


def _load(builder: Any, address: Any, is_bf16: bool) -> list[Any]:
    """COLUMNS elements as float32."""
    if not is_bf16:
        floats = builder.inttoptr(address, _SUMS.as_pointer())
        return [builder.load(builder.gep(floats, [_I64(half)]), align=4) for half in range(COLUMNS // _HALF)]
    bits = builder.inttoptr(address, _BITS.as_pointer())
    sixteen = ir.Constant(_LANES, [16] * _HALF)
    halves = [builder.load(builder.gep(bits, [_I64(half)]), align=2) for half in range(COLUMNS // _HALF)]
    return [builder.bitcast(builder.shl(builder.zext(half, _LANES), sixteen), _SUMS) for half in halves]


def _store(builder: Any, sums: Sequence[Any], address: Any, is_bf16: bool) -> None:
    kind = _BITS if is_bf16 else _SUMS
    target = builder.inttoptr(address, kind.as_pointer())
    for half, lanes in enumerate(sums):
        value = _round(builder, lanes) if is_bf16 else lanes
        builder.store(value, builder.gep(target, [_I64(half)]), align=2 if is_bf16 else 4)


def _round(builder: Any, sums: Any) -> Any:
    """The bits of the nearest bfloat16, ties to even; NaN is 0x7fc0. In integers, as `bf16.narrow` does it."""

    def every(number: int) -> Any:
        return ir.Constant(_LANES, [number] * _HALF)

    bits = builder.bitcast(sums, _LANES)
    is_odd = builder.and_(builder.lshr(bits, every(16)), every(1))
    rounded = builder.lshr(builder.add(bits, builder.add(is_odd, every(0x7FFF))), every(16))
    is_nan = builder.icmp_unsigned(">", builder.and_(bits, every(0x7FFFFFFF)), every(0x7F800000))
    return builder.trunc(builder.select(is_nan, every(0x7FC0), rounded), _BITS)


def _spread(builder: Any, scales: Any, number: int) -> Any:
    """scales[number] in all lanes."""
    scale = builder.load(builder.gep(builder.inttoptr(scales, _FLOAT.as_pointer()), [_I64(number)]))
    undefined = ir.Constant(_SUMS, ir.Undefined)
    single = builder.insert_element(undefined, scale, _I32(0))
    return builder.shuffle_vector(single, undefined, ir.Constant(_LANES, [0] * _HALF))
