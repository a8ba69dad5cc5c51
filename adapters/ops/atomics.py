"""Loads, stores and additions that threads see whole, and calls by address: what numba has no words for."""

import platform
from typing import Any

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

_intrinsic: Any = numba.extending.intrinsic
_I32, _I64 = ir.IntType(32), ir.IntType(64)


@_intrinsic
def load(_typing: Any, address: Any) -> Any:
    """The int64 at `address`; what its writer wrote before it is seen, too."""
    return types.int64(types.int64), lambda _c, builder, _s, args: builder.load_atomic(
        builder.inttoptr(args[0], _I64.as_pointer()), "acquire", 8
    )


@_intrinsic
def store(_typing: Any, address: Any, value: Any) -> Any:
    """`value` at `address`, after all that was written before it."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], _I64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_intrinsic
def fetch_add(_typing: Any, address: Any, value: Any) -> Any:
    """The value at `address` before `value` was added, in one indivisible step."""
    return types.int64(types.int64, types.int64), lambda _c, builder, _s, args: builder.atomic_rmw(
        "add", builder.inttoptr(args[0], _I64.as_pointer()), args[1], "acq_rel"
    )


@_intrinsic
def rewrite(_typing: Any, address: Any) -> Any:
    """Put 0 in the place of 0 at `address`, which changes nothing and still takes the page for writing.

    Not by adding 0, which the compiler knows to be no writing, nor after reading, which has a page of zeros put there.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        target = builder.inttoptr(args[0], _I64.as_pointer())
        builder.cmpxchg(target, _I64(0), _I64(0), "acq_rel", "monotonic")
        return context.get_dummy_value()

    return types.void(types.int64), generate


@_intrinsic
def call(_typing: Any, function: Any, arguments: Any, chunk: Any) -> Any:
    """Call the C function at address `function`."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], args[2]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@_intrinsic
def pause(_typing: Any) -> Any:
    """Tell the processor that this is a waiting loop."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            nothing = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), nothing), [])
        return context.get_dummy_value()

    return types.void(), generate
