"""What a kernel reads next, asked for at the pace at which it reads. Knows nothing of LoRA.

Data in many short stretches come slowly: the processor foresees little of each and waits at the beginning of the next.
A plan lists the stretches in the order of reading. DISTANCE bytes are asked for at once; from then on, with every byte
computed, one that much further on, into the second-level cache. Spread over the arithmetic, the requests keep memory
busy all the time; in a burst they fill the queue, and the arithmetic waits.
"""

from collections.abc import Callable
from typing import Any

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types

from adapters.ops.bf16_dot import declare
from adapters.ops.numba_kernels import INLINED, OPTIONS

DISTANCE = 3 << 12
"""Bytes from what is computed to what is asked for. With 8 KiB wide modules are slower, with 24 narrow ones."""

UNIT = 256
"""Bytes asked for at once; stretches are rounded up to whole ones."""

# Fields of a plan, int64. The unit at an offset is the one at FROM + offset; from END on, JUMP bytes further, but no
# further than LAST. Then where the next bytes begin, in which stretch, how many there are, and (begin, end) of each.
_FROM, _END, _JUMP, _LAST, _POSITION, _CURRENT, _COUNT, _STRETCHES = range(8)
_LINE = 64

_intrinsic: Any = numba.extending.intrinsic
_I32, _I64 = ir.IntType(32), ir.IntType(64)


@njit(**OPTIONS)
def plan_fields(num_stretches: int) -> int:
    """How many int64 a plan of so many stretches takes."""
    return _STRETCHES + 2 * num_stretches


@njit(**OPTIONS)
def clear(plan: Any) -> None:
    plan[_CURRENT] = plan[_COUNT] = 0


@njit(**INLINED)
def append(plan: Any, address: int, num_bytes: int) -> None:
    """One stretch more, if it has any bytes."""
    if num_bytes > 0:
        at = _STRETCHES + 2 * plan[_COUNT]
        plan[at], plan[at + 1] = address, address + (num_bytes + UNIT - 1) // UNIT * UNIT
        plan[_COUNT] += 1


@njit(**INLINED)
def take(plan: Any, num_bytes: int) -> None:
    """Make the next bytes those to ask for. They reach into the next stretch, but not beyond it."""
    position, current = plan[_POSITION], plan[_CURRENT]
    at = _STRETCHES + 2 * current
    end, after = plan[at + 1], position + (num_bytes + UNIT - 1) // UNIT * UNIT
    plan[_FROM], plan[_END], plan[_JUMP], plan[_LAST] = position, end, 0, end - UNIT
    if current + 1 < plan[_COUNT]:
        plan[_JUMP], plan[_LAST] = plan[at + 2] - end, plan[at + 3] - UNIT
        if after >= end:
            plan[_CURRENT] += 1
            after, end = after + plan[_JUMP], plan[at + 3]
    plan[_POSITION] = min(after, end)


@njit(**OPTIONS)
def begin_plan(plan: Any, is_fetched: bool) -> None:
    """Ask for the first DISTANCE bytes, unless an earlier plan, which ran on to this one, has."""
    if plan[_COUNT] == 0:
        return
    plan[_POSITION], left = plan[_STRETCHES], DISTANCE
    while left > 0:
        rest = plan[_STRETCHES + 2 * plan[_CURRENT] + 1] - plan[_POSITION]
        if rest == 0 and plan[_CURRENT] + 1 == plan[_COUNT]:
            return
        part = min(left, max(rest, UNIT))
        take(plan, part)
        if not is_fetched:
            fetch(plan.ctypes.data, part)
        left -= part


@_intrinsic
def fetch(_typing: Any, plan: Any, num_bytes: Any) -> Any:
    """Ask at once for the bytes that were taken. `plan` is its address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        plan, num_bytes = args
        ask = asking(builder, plan)
        before, loop, after = builder.block, builder.append_basic_block("ask"), builder.append_basic_block("ask.end")
        builder.branch(loop)
        builder.position_at_end(loop)
        offset = builder.phi(_I64)
        ask(offset, UNIT)
        following = builder.add(offset, _I64(UNIT))
        builder.cbranch(builder.icmp_signed("<", following, num_bytes), loop, after)
        offset.add_incoming(_I64(0), before)
        offset.add_incoming(following, loop)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def asking(builder: Any, plan: Any) -> Callable[[Any, int], None]:
    """What writes the code that asks for some bytes, a unit at most, at an offset of those taken from the plan."""
    address = addressing(builder, plan)
    byte = ir.IntType(8).as_pointer()
    prefetch = declare(builder, "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32]))

    def ask(offset: Any, num_bytes: int) -> None:
        at = address(offset)
        for line in range(0, num_bytes, _LINE):  # to be read (0), soon but not at once (2), data (1)
            builder.call(prefetch, [builder.inttoptr(builder.add(at, _I64(line)), byte), _I32(0), _I32(2), _I32(1)])

    return ask


def addressing(builder: Any, plan: Any) -> Callable[[Any], Any]:
    """What writes the code that finds where the bytes at an offset of those taken are."""
    fields = builder.inttoptr(plan, _I64.as_pointer())
    start, end, jump, last = (builder.load(builder.gep(fields, [_I64(i)])) for i in (_FROM, _END, _JUMP, _LAST))

    def address(offset: Any) -> Any:
        near = builder.add(start, offset)
        far = builder.add(near, jump)
        far = builder.select(builder.icmp_signed("<", far, last), far, last)
        return builder.select(builder.icmp_signed("<", near, end), near, far)

    return address
