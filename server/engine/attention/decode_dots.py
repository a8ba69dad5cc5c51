"""The two inner loops of a decode row's attention in bfloat16: scores of a few heads, and their mix of values.

The heads that read one KV head share what is loaded: 16 keys at a time become 16 scores of each head by the processor's
dot product and a tree of shuffles, and a value is widened once for all of them. Keys and values are read in place, by
slot, and asked for some tokens ahead. Sums, scores and weights are float32. A head's result depends on its own keys
alone. Only where `bf16_dot.is_supported`; knows nothing of softmax, windows or blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from adapters.ops.bf16_dot import LANES, PAIRS, BFloat, declare, declare_dot, is_supported

KEYS = 16
"""Keys whose scores are found at once; slots and scores are padded to a multiple of it."""

AHEAD = 32
"""Tokens between the one being read and the one being asked for; slots are padded by as many."""

MAX_HEADS = 4
MAX_HEAD_DIM = 128

_I16, _I32, _I64, _FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTE = ir.IntType(8).as_pointer()
_SUMS = ir.VectorType(_FLOAT, 16)
_WORDS = ir.VectorType(_I32, 16)
_NARROW = ir.VectorType(BFloat(), 16)
_NARROW_BITS = ir.VectorType(_I16, 16)
_intrinsic: Any = numba.extending.intrinsic


@_intrinsic
def score_keys(
    _typing: Any,
    num_heads: Any,
    dim: Any,
    q: Any,
    keys: Any,
    slots: Any,
    slot_stride: Any,
    count: Any,
    scale: Any,
    scores: Any,
    score_stride: Any,
) -> Any:
    """scores[h, i] = scale · q[h] · keys[slots[i]] for 1 to MAX_HEADS heads, `count` a positive multiple of KEYS.

    q is [num_heads, dim] in one piece, `slots` int64 [count + AHEAD]. Addresses; strides in bytes.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        heads, dim, q, keys, slots, slot_stride, count, scale, scores, score_stride = args
        steps = builder.udiv(dim, _int(LANES))
        sizes = [(h, s) for h in range(1, MAX_HEADS + 1) for s in range(1, MAX_HEAD_DIM // LANES + 1)]
        emit = partial(_emit_scores, builder, q, keys, slots, slot_stride, count, scale, scores, score_stride)
        _switch(builder, _code(builder, heads, steps), {_number(*size): partial(emit, *size) for size in sizes})
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, types.float32, types.int64, types.int64), generate


@_intrinsic
def mix_values(
    _typing: Any,
    num_heads: Any,
    dim: Any,
    weights: Any,
    weight_stride: Any,
    values: Any,
    slots: Any,
    slot_stride: Any,
    count: Any,
    out: Any,
    out_stride: Any,
) -> Any:
    """out[h] = Σ_i weights[h, i] · values[slots[i]] for 1 to MAX_HEADS heads and `dim` of 32 or 64 columns, rounded
    once; one chain of sums in the order of i.

    `slots` is int64 [count + AHEAD], weights are float32. Addresses; strides in bytes.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        heads, dim, weights, weight_stride, values, slots, slot_stride, count, out, out_stride = args
        steps = builder.udiv(dim, _int(LANES))
        sizes = [(h, s) for h in range(1, MAX_HEADS + 1) for s in (1, 2)]
        emit = partial(_emit_mix, builder, weights, weight_stride, values, slots, slot_stride, count, out, out_stride)
        _switch(builder, _code(builder, heads, steps), {_number(*size): partial(emit, *size) for size in sizes})
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), generate


def _emit_scores(
    builder: Any, q: Any, keys: Any, slots: Any, slot_stride: Any, count: Any, scale: Any, scores: Any, stride: Any,
    num_heads: int, steps: int,
) -> None:  # fmt: skip
    """The loop over groups of KEYS keys."""
    dot, zero = declare_dot(builder), ir.Constant(_SUMS, None)
    queries = [[_load(builder, q, PAIRS, 64 * (h * steps + c)) for c in range(steps)] for h in range(num_heads)]

    def body(first: Any) -> None:
        trees = [_Tree(builder) for _ in range(num_heads)]
        here = builder.add(slots, builder.mul(first, _int(8)))
        for i in range(KEYS):
            key = _place(builder, keys, here, i, slot_stride)
            _fetch(builder, _place(builder, keys, here, i + AHEAD, slot_stride), steps)
            parts = [_load(builder, key, PAIRS, 64 * c) for c in range(steps)]
            for h in range(num_heads):
                sums = zero
                for c in range(steps):
                    sums = builder.call(dot, [sums, queries[h][c], parts[c]])
                trees[h].add(sums)
        for h in range(num_heads):
            row = builder.add(scores, builder.add(builder.mul(stride, _int(h)), builder.mul(first, _int(4))))
            scaled = builder.fmul(trees[h].total(), _splat(builder, scale, _SUMS))
            builder.store(scaled, _at(builder, row, _SUMS), align=4)

    _loop(builder, count, KEYS, body)


class _Tree:
    """Sums of the lanes of 16 registers, as the lanes of one. Registers come one by one and meet in pairs, so that few
    are held: at each level half the lanes of both make one register."""

    # For a pair of registers (lanes 0-15 and 16-31), the lanes that are added to one another; all are single
    # instructions of the processor: halves, quarters, then pairs and single lanes within quarters.
    _LEVELS = (
        ([*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]),
        ([q * 4 + i for q in (0, 2, 4, 6) for i in range(4)], [q * 4 + i for q in (1, 3, 5, 7) for i in range(4)]),
        ([q * 4 + i for q in range(4) for i in (0, 1, 16, 17)], [q * 4 + i for q in range(4) for i in (2, 3, 18, 19)]),
        ([q * 4 + i for q in range(4) for i in (0, 2, 16, 18)], [q * 4 + i for q in range(4) for i in (1, 3, 17, 19)]),
    )

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self._held: list[tuple[int, Any, list[int]]] = []  # level, register, and whose sum each lane is part of
        self._count = 0

    def add(self, register: Any) -> None:
        level, owners = 0, [self._count] * 16
        self._count += 1
        while self._held and self._held[-1][0] == level:
            _, other, others = self._held.pop()
            near, far = self._LEVELS[level]
            both = others + owners
            owners = [both[lane] for lane in near]
            assert owners == [both[lane] for lane in far]
            register = self._builder.fadd(self._shuffled(other, register, near), self._shuffled(other, register, far))
            level += 1
        self._held.append((level, register, owners))

    def total(self) -> Any:
        """Lane i: the sum of the register added as number i."""
        ((_, register, owners),) = self._held
        return self._shuffled(register, register, [owners.index(i) for i in range(16)])

    def _shuffled(self, a: Any, b: Any, lanes: list[int]) -> Any:
        return self._builder.shuffle_vector(a, b, ir.Constant(_WORDS, lanes))


def _emit_mix(
    builder: Any, weights: Any, weight_stride: Any, values: Any, slots: Any, slot_stride: Any, count: Any, out: Any,
    out_stride: Any, num_heads: int, steps: int,
) -> None:  # fmt: skip
    """The loop over values, two sums a step and head: of the even and of the odd columns."""
    fma = declare(builder, "llvm.fma.v16f32", ir.FunctionType(_SUMS, [_SUMS] * 3))
    rows = [builder.add(weights, builder.mul(weight_stride, _int(h))) for h in range(num_heads)]
    zero = ir.Constant(_SUMS, None)

    def body(i: Any, sums: list[Any]) -> list[Any]:
        here = builder.add(slots, builder.mul(i, _int(8)))
        value = _place(builder, values, here, 0, slot_stride)
        _fetch(builder, _place(builder, values, here, AHEAD, slot_stride), steps)
        columns = [part for c in range(steps) for part in _widened(builder, _load(builder, value, _WORDS, 64 * c))]
        added = []
        for h, row in enumerate(rows):
            weight = _load(builder, builder.add(row, builder.mul(i, _int(4))), _FLOAT, 0)
            spread = _splat(builder, weight, _SUMS)
            own = sums[h * 2 * steps : (h + 1) * 2 * steps]
            added += [builder.call(fma, [spread, part, total]) for part, total in zip(columns, own, strict=True)]
        return added

    sums = _loop_with(builder, count, [zero] * (num_heads * 2 * steps), body)
    for h in range(num_heads):
        for c in range(steps):
            even, odd = sums[2 * (h * steps + c) :][:2]
            place = builder.add(out, builder.add(builder.mul(out_stride, _int(h)), _int(64 * c)))
            builder.store(_narrowed(builder, even, odd), _at(builder, place, _WORDS), align=2)


def _widened(builder: Any, words: Any) -> tuple[Any, Any]:
    """The even and the odd of 32 bfloat16 as float32: bfloat16 is its upper half."""
    even = builder.shl(words, ir.Constant(_WORDS, [16] * 16))
    odd = builder.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * 16))
    return builder.bitcast(even, _SUMS), builder.bitcast(odd, _SUMS)


def _narrowed(builder: Any, even: Any, odd: Any) -> Any:
    """32 bfloat16 from their even and odd ones."""
    narrow = declare(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.FunctionType(_NARROW, [_SUMS]))
    low, high = (
        builder.zext(builder.bitcast(builder.call(narrow, [each]), _NARROW_BITS), _WORDS) for each in (even, odd)
    )
    return builder.or_(low, builder.shl(high, ir.Constant(_WORDS, [16] * 16)))


def _place(builder: Any, base: Any, slots: Any, number: int, stride: Any) -> Any:
    """Where the token of slots[number] lies."""
    return builder.add(base, builder.mul(_load(builder, slots, _I64, 8 * number), stride))


def _fetch(builder: Any, address: Any, num_lines: int) -> None:
    """Ask for cache lines to be brought into the second cache."""
    fetch = declare(builder, "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [_BYTE, _I32, _I32, _I32]))
    for line in range(num_lines):
        at = builder.inttoptr(builder.add(address, _int(64 * line)), _BYTE)
        builder.call(fetch, [at, _I32(0), _I32(2), _I32(1)])


def _loop(builder: Any, count: Any, step: int, body: Callable[[Any], None]) -> None:
    def without(i: Any, _carried: list[Any]) -> list[Any]:
        body(i)
        return []

    _loop_with(builder, count, [], without, step)


def _loop_with(
    builder: Any, count: Any, starts: list[Any], body: Callable[[Any, list[Any]], list[Any]], step: int = 1
) -> list[Any]:
    """for i in range(0, count, step): carried = body(i, carried); count is positive. What is carried at the end."""
    before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("loop.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(_I64)
    carried = [builder.phi(start.type) for start in starts]
    ends = body(i, carried)
    following = builder.add(i, _int(step))
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    for phi, start, end in zip([i, *carried], [_int(0), *starts], [following, *ends], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(end, loop)
    builder.position_at_end(after)
    return ends


def _number(heads: int, steps: int) -> int:
    return heads * 256 + steps


def _code(builder: Any, heads: Any, steps: Any) -> Any:
    return builder.add(builder.mul(heads, _int(256)), steps)


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


def _splat(builder: Any, element: Any, kind: Any) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    single = builder.insert_element(undefined, element, _I32(0))
    return builder.shuffle_vector(single, undefined, ir.Constant(_WORDS, [0] * 16))


def _load(builder: Any, address: Any, kind: Any, offset: int) -> Any:
    return builder.load(_at(builder, builder.add(address, _int(offset)), kind), align=2)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _int(number: int) -> Any:
    return ir.Constant(_I64, number)
