"""bfloat16 inside numba: its bits as uint16, widened and narrowed by intrinsics, so that one kernel serves both dtypes.

numba and numpy know no bfloat16. A bf16 tensor is read at its address (`pointer`) as uint16 bits; `widen` turns a
stored element into float32 and `narrow` turns a float32 back into the element type of an array. Both are resolved when
numba compiles, so `widen(x[i])` is a plain load for a float32 array. Knows nothing of LoRA.
"""

from typing import Any

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

_intrinsic: Any = numba.extending.intrinsic  # its annotation describes the typing function, not the kernel's view
_I32 = ir.IntType(32)
_SIXTEEN = ir.Constant(_I32, 16)


@_intrinsic
def widen(_typing: Any, element: Any) -> Any:
    """float32 value of one stored element: bf16 bits are the upper half of a float32."""
    if element == types.uint16:
        return types.float32(types.uint16), _bits_to_f32
    if element == types.float32:
        return types.float32(types.float32), lambda _context, _builder, _signature, args: args[0]
    return None


@_intrinsic
def narrow(_typing: Any, value: Any, array: Any) -> Any:
    """`value` (float32) as an element of `array`, rounded to nearest even when that is bf16; only its type is used."""
    if value != types.float32 or not isinstance(array, types.Array):
        return None
    if array.dtype == types.uint16:
        return types.uint16(value, array), _f32_to_bits
    if array.dtype == types.float32:
        return types.float32(value, array), lambda _context, _builder, _signature, args: args[0]
    return None


def _bits_to_f32(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _SIXTEEN), ir.FloatType())


def _f32_to_bits(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
    """bits = (x + 0x7fff + bit 16 of x) >> 16, in integers so that fastmath cannot drop the NaN case (0x7fc0)."""
    bits = builder.bitcast(args[0], _I32)
    is_odd = builder.and_(builder.lshr(bits, _SIXTEEN), ir.Constant(_I32, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(is_odd, ir.Constant(_I32, 0x7FFF))), _SIXTEEN)
    magnitude = builder.and_(bits, ir.Constant(_I32, 0x7FFFFFFF))
    is_nan = builder.icmp_unsigned(">", magnitude, ir.Constant(_I32, 0x7F800000))
    return builder.trunc(builder.select(is_nan, ir.Constant(_I32, 0x7FC0), rounded), ir.IntType(16))


@_intrinsic
def pointer(_typing: Any, address: Any) -> Any:
    """An integer address (Tensor.data_ptr) as void*, for numba.carray: a view that costs nothing to make."""
    if not isinstance(address, types.Integer):
        return None
    return types.voidptr(address), lambda context, builder, _signature, args: builder.inttoptr(
        args[0], context.get_value_type(types.voidptr)
    )
