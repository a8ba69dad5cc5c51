"""Up to 12 rows of bfloat16 or float32 times a matrix 32 columns wide, the inner loop of every product of ours.

The instruction VDPBF16PS multiplies 16 pairs of bfloat16 and adds each pair to one of 16 float32 sums. 12 rows of two
registers of sums, two registers of weights and one of x fill the 32 registers there are; the weights stream past once
for all rows. Few rows take several panels at once instead: more sums that do not wait for one another. Every sum runs
over the pairs in order, in one chain, however many rows there are: a row's result never depends on the rows beside it.
numba has no such instruction, so the loop is written in LLVM's terms. Only where `bf16_dot.is_supported`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from adapters.ops.bf16_dot import PAIRS, declare, is_supported
from adapters.ops.tile_element import BFLOAT16, FLOAT32, TileElement

WIDTH = 32
"""Columns: two registers of 16 float32 sums."""

MAX_ROWS = 12

MAX_PANELS = 4
"""Panels multiplied at once, where rows are so few that their sums leave registers free."""

AHEAD = 64
"""Pairs of weights between the one being multiplied and the one being fetched, 8 KiB: the processor's own fetching
ahead ends with each page of 4 KiB, and starts anew with each panel."""

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_SUMS = ir.VectorType(ir.FloatType(), 16)
_LANES = ir.VectorType(_I32, 16)
_BITS = ir.VectorType(_I16, 16)
_ROW = ir.VectorType(_I16, WIDTH)
_HALVES = WIDTH // 16
_BYTES_PER_PAIR = WIDTH * 2 * 2
_intrinsic: Any = numba.extending.intrinsic

Emit = Callable[..., Any]


@_intrinsic
def multiply_packed(
    _typing: Any,
    num_rows: Any,
    num_panels: Any,
    x: Any,
    x_stride: Any,
    weight: Any,
    num_pairs: Any,
    bias: Any,
    y: Any,
    y_stride: Any,
    following: Any,
) -> Any:
    """y[r] = bias + Σ_p x[r, pair p] · weight[:, p] for 1 to 12 rows and as many panels as `panels_at_once` says, or
    a smaller power of two; bias is float32, weight [num_panels, num_pairs, 32, 2] bfloat16.

    All are addresses, the strides in bytes; what lies `following` bytes after `weight` is fetched towards the end.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _multiply_packed(builder, BFLOAT16, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), generate


@_intrinsic
def multiply_packed_float32(
    _typing: Any,
    num_rows: Any,
    num_panels: Any,
    x: Any,
    x_stride: Any,
    weight: Any,
    num_inputs: Any,
    bias: Any,
    y: Any,
    y_stride: Any,
    following: Any,
) -> Any:
    """`multiply_packed` of float32: weight [num_panels, num_inputs, 32]."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _multiply_packed(builder, FLOAT32, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), generate


def _multiply_packed(
    builder: Any,
    element: TileElement,
    num_rows: Any,
    num_panels: Any,
    x: Any,
    x_stride: Any,
    weight: Any,
    num_pairs: Any,
    bias: Any,
    y: Any,
    y_stride: Any,
    following: Any,
) -> None:
    def emit(count: int, panels: int) -> None:
        registers = panels * _HALVES
        arrays = [_row(builder, weight, builder.mul(num_pairs, _int(_BYTES_PER_PAIR)), n) for n in range(panels)]

        def start(_y: Any) -> list[Any]:
            return [_load(builder, _at(builder, bias, _SUMS), number, align=4) for number in range(registers)]

        def weights(pair: Any) -> list[Any]:
            offset = _offset_ahead(builder, pair, num_pairs, following)
            for array in arrays:
                _fetch(builder, builder.add(array, offset))
            halves = [(array, half) for array in arrays for half in range(_HALVES)]
            return [_packed_pairs(builder, array, pair, half, element) for array, half in halves]

        _emit(builder, element, count, registers, x, x_stride, num_pairs, y, y_stride, start, weights)

    cases = {(count, panels): partial(emit, count, panels) for count, panels in _counts()}
    code = builder.add(builder.mul(num_panels, _int(MAX_ROWS + 1)), num_rows)
    _switch(builder, code, {panels * (MAX_ROWS + 1) + count: case for (count, panels), case in cases.items()})


def panels_at_once(num_rows: int) -> int:
    """How many panels `multiply_packed` takes at once for as many rows: their sums fill no more than 24 registers."""
    return 4 if num_rows <= 3 else 2 if num_rows <= 6 else 1


def _counts() -> list[tuple[int, int]]:
    """(rows, panels) that `multiply_packed` serves."""
    sizes = [1 << power for power in range(MAX_PANELS.bit_length())]
    rows = range(1, MAX_ROWS + 1)
    return [(count, panels) for count in rows for panels in sizes if panels <= panels_at_once(count)]


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
            first = builder.add(rows, builder.mul(builder.mul(pair, _int(2)), row_stride))
            even = _load(builder, _at(builder, first, _ROW), 0, align=2)
            odd = _load(builder, _at(builder, builder.add(first, row_stride), _ROW), 0, align=2)
            return [builder.bitcast(_interleave(builder, even, odd, half), PAIRS) for half in range(_HALVES)]

        def emit(count: int) -> None:
            _emit(builder, BFLOAT16, count, _HALVES, x, x_stride, num_pairs, y, y_stride, start, weights)

        _switch(builder, num_rows, {count: partial(emit, count) for count in range(1, MAX_ROWS + 1)})
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


def _switch(builder: Any, value: Any, cases: dict[int, Callable[[], None]]) -> None:
    """The code of every case, and the choice between them."""
    end = builder.append_basic_block("case.end")
    switch = builder.switch(value, end)
    for number, emit in cases.items() if is_supported() else ():
        block = builder.append_basic_block(f"case.{number}")
        switch.add_case(_int(number), block)
        builder.position_at_end(block)
        emit()
        builder.branch(end)
    builder.position_at_end(end)


def _emit(
    builder: Any,
    element: TileElement,
    count: int,
    registers: int,
    x: Any,
    x_stride: Any,
    num_pairs: Any,
    y: Any,
    y_stride: Any,
    start: Emit,
    weights: Emit,
) -> None:
    """The loop over pairs for `count` rows of so many registers from the sums `start(y)`, and the stores after it."""
    x_rows = [_at(builder, _row(builder, x, x_stride, r), _I32) for r in range(count)]
    y_rows = [_row(builder, y, y_stride, r) for r in range(count)]
    starts = [start(out) for out in y_rows]
    before, loop, after = builder.block, builder.append_basic_block("pairs"), builder.append_basic_block("pairs.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(_I64)
    sums = [[builder.phi(_SUMS) for _ in range(registers)] for _ in range(count)]
    here, dot = weights(pair), element.declare_dot(builder)
    added = []
    for r in range(count):
        spread = builder.bitcast(_spread(builder, _load(builder, x_rows[r], pair, align=2)), element.lanes)
        added.append([element.dot(builder, dot, sums[r][half], spread, here[half]) for half in range(registers)])
    following = builder.add(pair, _int(1))
    builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, after)
    pair.add_incoming(_int(0), before)
    pair.add_incoming(following, loop)
    for r in range(count):
        for half in range(registers):
            sums[r][half].add_incoming(starts[r][half], before)
            sums[r][half].add_incoming(added[r][half], loop)
    builder.position_at_end(after)
    for r in range(count):
        element.store(builder, added[r], y_rows[r])


def _packed_pairs(builder: Any, panel: Any, pair: Any, half: int, element: TileElement) -> Any:
    """Half the weights of one pair of inputs."""
    number = builder.add(builder.mul(pair, _int(_HALVES)), _int(half))
    return builder.bitcast(_load(builder, _at(builder, panel, _LANES), number, align=64), element.lanes)


def _offset_ahead(builder: Any, pair: Any, num_pairs: Any, following: Any) -> Any:
    """Bytes from a panel's start to the pair AHEAD of this one, in the panel `following` bytes on where this one has
    ended."""
    wanted = builder.add(pair, _int(AHEAD))
    beyond = builder.icmp_signed(">=", wanted, num_pairs)
    jump = builder.sub(following, builder.mul(num_pairs, _int(_BYTES_PER_PAIR)))
    return builder.add(builder.mul(wanted, _int(_BYTES_PER_PAIR)), builder.select(beyond, jump, _int(0)))


def _fetch(builder: Any, address: Any) -> None:
    """Ask for one pair's weights to be brought into the second cache: the first is too small for so far ahead."""
    byte = ir.IntType(8).as_pointer()
    fetch = declare(builder, "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32]))
    for line in range(0, _BYTES_PER_PAIR, 64):
        at = builder.inttoptr(builder.add(address, _int(line)), byte)
        builder.call(fetch, [at, _I32(0), _I32(2), _I32(1)])


def _int(number: int) -> Any:
    return ir.Constant(_I64, number)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _row(builder: Any, address: Any, stride: Any, number: int) -> Any:
    return builder.add(address, builder.mul(_int(number), stride))


def _load(builder: Any, array: Any, index: Any, *, align: int) -> Any:
    index = _int(index) if isinstance(index, int) else index
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
