"""The two inner loops of a decode row's attention in bfloat16: scores of a few heads, and their mix of values.

The heads that read one KV head share what is loaded: 16 keys at a time become 16 scores of each head by the processor's
dot product and a tree of shuffles, and a value is widened once for all of them. Keys and values are read in place, by
slot, and asked for some tokens ahead. Sums, scores and weights are float32. A head's result depends on its own keys
alone. Only where `bf16_dot.is_supported`; knows nothing of softmax, windows or blocks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from adapters.ops.bf16_dot import LANES, PAIRS, declare, declare_dot, is_supported
from server.engine.attention.lane_sums import LaneSums

KEYS = 16
"""Keys whose scores are found at once; slots and scores are padded to a multiple of it."""

_QUARTER = KEYS // 4

AHEAD = 32
"""Tokens between the one being read and the one being asked for; slots are padded by as many."""

MAX_HEADS = 4

HEAD_DIMS = (64, 128)
"""Elements of q and k that code is written for: what nearly all models have, since code takes time to compile."""

COLUMNS = 64
"""Columns of values mixed at once."""

_I32, _I64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTE = ir.IntType(8).as_pointer()
_SUMS = ir.VectorType(_FLOAT, 16)
_WORDS = ir.VectorType(_I32, 16)
_intrinsic: Any = numba.extending.intrinsic


@_intrinsic
def score_keys(
    _typing: Any,
    cache: Any,
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

    q is [num_heads, dim] in one piece, dim one of HEAD_DIMS, `slots` int64 [count + AHEAD]. Addresses; strides in
    bytes; of `cache` only the type is used.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _, heads, dim, q, keys, slots, slot_stride, count, scale, scores, score_stride = args
        steps = builder.udiv(dim, _int(LANES))
        sizes = _sizes(cache, HEAD_DIMS)
        room: Any = cgutils.alloca_once(  # type: ignore[no-untyped-call]
            builder, _SUMS, size=_int(MAX_HEADS * KEYS // _QUARTER)
        )
        held = builder.ptrtoint(room, _I64)
        emit = partial(_emit_scores, builder, q, keys, slots, slot_stride, count, scale, scores, score_stride, held)
        _switch(builder, _code(builder, heads, steps), {_number(*size): partial(emit, *size) for size in sizes})
        return context.get_dummy_value()

    return types.void(cache, *[types.int64] * 7, types.float32, types.int64, types.int64), generate


@_intrinsic
def mix_values(
    _typing: Any,
    cache: Any,
    num_heads: Any,
    weights: Any,
    weight_stride: Any,
    values: Any,
    slots: Any,
    slot_stride: Any,
    count: Any,
    totals: Any,
    total_stride: Any,
) -> Any:
    """totals[h] += Σ_i weights[h, i] · values[slots[i]] for 1 to MAX_HEADS heads and COLUMNS columns; one chain
    of sums in the order of i.

    `slots` is int64 [count + AHEAD]; weights and totals are float32. Of 32 columns the 16 even ones come first, then
    the odd ones. Addresses; strides in bytes; of `cache` only the type is used.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _, heads, weights, weight_stride, values, slots, slot_stride, count, totals, total_stride = args
        sizes = _sizes(cache, (COLUMNS,))
        emit = partial(
            _emit_mix, builder, weights, weight_stride, values, slots, slot_stride, count, totals, total_stride
        )
        _switch(
            builder,
            _code(builder, heads, _int(COLUMNS // LANES)),
            {_number(*size): partial(emit, *size) for size in sizes},
        )
        return context.get_dummy_value()

    return types.void(cache, *[types.int64] * 9), generate


def _emit_scores(
    builder: Any, q: Any, keys: Any, slots: Any, slot_stride: Any, count: Any, scale: Any, scores: Any, stride: Any,
    held: Any, num_heads: int, steps: int,
) -> None:  # fmt: skip
    """The loop over groups of KEYS keys, and in it one over _QUARTER keys, so that there is less code to compile.

    `held` has room for a register of each head and quarter: [num_heads, KEYS / _QUARTER].
    """
    queries = [[_load(builder, q, PAIRS, 64 * (h * steps + c)) for c in range(steps)] for h in range(num_heads)]
    owners = [lane // 4 for lane in range(16)]  # of a quarter's sums

    def quarter(here: Any, first: Any) -> None:
        at = builder.add(here, builder.mul(first, _int(8)))
        for h, tree in enumerate(_dots(builder, queries, keys, at, slot_stride)):
            register, lanes = tree.result()
            assert lanes == owners
            place = builder.add(held, builder.mul(builder.add(first, _int(KEYS * h)), _int(64 // _QUARTER)))
            builder.store(register, _at(builder, place, _SUMS))

    def body(first: Any) -> None:
        here = builder.add(slots, builder.mul(first, _int(8)))
        _loop(builder, _int(KEYS), _QUARTER, partial(quarter, here))
        for h in range(num_heads):
            tree = LaneSums(builder)
            for number in range(0, KEYS, _QUARTER):
                register = _load(builder, held, _SUMS, (KEYS * h + number) * 64 // _QUARTER)
                tree.add(register, [number + owner for owner in owners], level=2)
            register, lanes = tree.result()
            total = tree.shuffled(register, register, [lanes.index(i) for i in range(16)])
            row = builder.add(scores, builder.add(builder.mul(stride, _int(h)), builder.mul(first, _int(4))))
            builder.store(builder.fmul(total, _splat(builder, scale, _SUMS)), _at(builder, row, _SUMS), align=4)

    _loop(builder, count, KEYS, body)


def _dots(builder: Any, queries: list[list[Any]], keys: Any, slots: Any, slot_stride: Any) -> list[LaneSums]:
    """For each query the products with _QUARTER keys, on the way to being summed."""
    dot, zero = declare_dot(builder), ir.Constant(_SUMS, None)
    trees = [LaneSums(builder) for _ in queries]
    for i in range(_QUARTER):
        key = _place(builder, keys, slots, i, slot_stride)
        _fetch(builder, _place(builder, keys, slots, i + AHEAD, slot_stride), len(queries[0]))
        parts = [_load(builder, key, PAIRS, 64 * c) for c in range(len(queries[0]))]
        for query, tree in zip(queries, trees, strict=True):
            sums = zero
            for each, part in zip(query, parts, strict=True):
                sums = builder.call(dot, [sums, each, part])
            tree.add(sums, [i] * 16, level=0)
    return trees


def _emit_mix(
    builder: Any, weights: Any, weight_stride: Any, values: Any, slots: Any, slot_stride: Any, count: Any, totals: Any,
    total_stride: Any, num_heads: int, steps: int,
) -> None:  # fmt: skip
    """The loop over values, two sums a step and head: of the even and of the odd columns."""
    fma = declare(builder, "llvm.fma.v16f32", ir.FunctionType(_SUMS, [_SUMS] * 3))
    rows = [builder.add(weights, builder.mul(weight_stride, _int(h))) for h in range(num_heads)]
    number = num_heads * 2 * steps
    places = [
        builder.add(
            totals, builder.add(builder.mul(total_stride, _int(n // (2 * steps))), _int(64 * (n % (2 * steps))))
        )
        for n in range(number)
    ]

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

    sums = _loop_with(builder, count, [_load(builder, place, _SUMS, 0) for place in places], body)
    for place, total in zip(places, sums, strict=True):
        builder.store(total, _at(builder, place, _SUMS), align=2)


def _widened(builder: Any, words: Any) -> tuple[Any, Any]:
    """The even and the odd of 32 bfloat16 as float32: bfloat16 is its upper half."""
    even = builder.shl(words, ir.Constant(_WORDS, [16] * 16))
    odd = builder.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * 16))
    return builder.bitcast(even, _SUMS), builder.bitcast(odd, _SUMS)


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
    following, last = builder.add(i, _int(step)), builder.block
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    for phi, start, end in zip([i, *carried], [_int(0), *starts], [following, *ends], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(end, last)
    builder.position_at_end(after)
    return ends


def _sizes(cache: Any, dims: Sequence[int]) -> list[tuple[int, int]]:
    """(heads, steps of LANES elements) that code is written for: none for a cache of float32, or without the
    instruction; such calls stand in code that is never reached."""
    steps = [dim // LANES for dim in dims]
    is_served = cache.dtype == types.uint16 and is_supported()
    return [(h, s) for h in range(1, MAX_HEADS + 1) for s in steps] if is_served else []


def _number(heads: int, steps: int) -> int:
    return heads * 256 + steps


def _code(builder: Any, heads: Any, steps: Any) -> Any:
    return builder.add(builder.mul(heads, _int(256)), steps)


def _switch(builder: Any, value: Any, cases: dict[int, Callable[[], None]]) -> None:
    """The code of every case, and the choice between them."""
    end = builder.append_basic_block("case.end")
    switch = builder.switch(value, end)
    for number, emit in cases.items():
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
