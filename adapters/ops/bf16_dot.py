"""Scalar products of one bfloat16 row with several, by the instruction that processors with AVX512-BF16 have for it.

VDPBF16PS multiplies 16 pairs of bfloat16 and adds each pair to one of 16 float32 sums, four times the work of widening
both and multiplying. numba has no such instruction, so the loop is written in LLVM's terms. Knows nothing of LoRA.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba.extending
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types

LANES = 32
"""Elements the instruction takes at once: the length of the rows must be a multiple of it."""

ROWS_AT_ONCE = 4
"""Rows multiplied at once, so that x is read once for all."""

_intrinsic: Any = numba.extending.intrinsic
_I64 = ir.IntType(64)
_FLOAT = ir.FloatType()
_SUMS = ir.VectorType(_FLOAT, 16)


class BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


PAIRS = ir.VectorType(BFloat(), LANES)


@cache
def is_supported() -> bool:
    """Whether this processor has the instruction."""
    return bool(binding.get_host_cpu_features().get("avx512bf16", False))


def declare_dot(builder: Any) -> Any:
    """sums [16] + Σ over each pair of a · b, for a and b of 32 bfloat16."""
    return declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", ir.FunctionType(_SUMS, [_SUMS, PAIRS, PAIRS]))


def declare(builder: Any, name: str, kind: Any) -> Any:
    """The function `name` in the module being built, declared once."""
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


@_intrinsic
def uses_dots(_typing: Any, array: Any) -> Any:
    """Whether `array` is of bfloat16 and the processor has the instruction: a constant to the compiler."""
    yes = array.dtype == types.uint16 and is_supported()
    return types.boolean(array), lambda _c, _b, _s, _args: ir.Constant(ir.IntType(1), yes)


@_intrinsic
def dot_rows(_typing: Any, x: Any, rows: Any, stride: Any, length: Any, out: Any) -> Any:
    """out[r] = x · rows[r] for ROWS_AT_ONCE rows: addresses, stride in bytes, `length` a positive multiple of LANES.

    Only where `uses_dots`; elsewhere it stands in code that is never reached.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if not is_supported():
            return context.get_dummy_value()
        emit_dots(builder, lambda _step: None, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def emit_dots(
    builder: Any, beside: Callable[[Any], None], x: Any, rows: Any, stride: Any, length: Any, out: Any
) -> None:
    """The code of `dot_rows`, and in each step of its loop what `beside` writes for the step's number."""
    pairs = PAIRS.as_pointer()
    x_at = builder.inttoptr(x, pairs)
    row_at = [
        builder.inttoptr(builder.add(rows, builder.mul(stride, ir.Constant(_I64, r))), pairs)
        for r in range(ROWS_AT_ONCE)
    ]
    num_steps = builder.udiv(length, ir.Constant(_I64, LANES))
    before, loop, after = builder.block, builder.append_basic_block("dots"), builder.append_basic_block("dots.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    sums = [builder.phi(_SUMS) for _ in range(ROWS_AT_ONCE)]
    beside(step)
    here = builder.load(builder.gep(x_at, [step]), align=2)
    dot = declare_dot(builder)
    added = [
        builder.call(dot, [sums[r], here, builder.load(builder.gep(row_at[r], [step]), align=2)])
        for r in range(ROWS_AT_ONCE)
    ]
    following = builder.add(step, ir.Constant(_I64, 1))
    builder.cbranch(builder.icmp_unsigned("<", following, num_steps), loop, after)
    step.add_incoming(ir.Constant(_I64, 0), before)
    step.add_incoming(following, loop)
    for r in range(ROWS_AT_ONCE):
        sums[r].add_incoming(ir.Constant(_SUMS, None), before)
        sums[r].add_incoming(added[r], loop)
    builder.position_at_end(after)
    _store_totals(builder, added, out)


def _store_totals(builder: Any, sums: Sequence[Any], out: Any) -> None:
    """out[r] = the total of sums[r]."""
    reduce = declare(builder, "llvm.vector.reduce.fadd.v16f32", ir.FunctionType(_FLOAT, [_FLOAT, _SUMS]))
    target = builder.inttoptr(out, _FLOAT.as_pointer())
    for r, lanes in enumerate(sums):
        total = builder.call(reduce, [ir.Constant(_FLOAT, 0.0), lanes], fastmath=("reassoc",))
        builder.store(total, builder.gep(target, [ir.Constant(_I64, r)]))
