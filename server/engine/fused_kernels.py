"""The numba kernels of the small operations between the linears: RMSNorm and rotary embedding.

One pass over memory each, rounded where the models' own chains of torch operations round, so that nearly every bit is
theirs. Elements are bf16 as uint16 bits or float32 as it is (adapters/ops/bf16.py), reached through raw addresses.
Knows nothing of modules and checks nothing: whoever calls stands for dtypes, shapes and strides.
"""

# mypy: disallow-untyped-decorators=False
# numba's decorators are untyped and would make every kernel an error.

from collections.abc import Callable
from functools import cache
from typing import Any

import numba.extending
import numpy as np
import torch
from numba import njit, types
from numba.np.numpy_support import carray, from_dtype

from adapters.ops.bf16 import STORAGE, narrow, widen
from adapters.ops.numba_kernels import entry_point

# Sums may be reordered; products that models round one by one may not be contracted into one rounding.
_SUM: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy", "nogil": True}
_ROUNDED: dict[str, Any] = {"error_model": "numpy", "nogil": True}


_intrinsic: Any = numba.extending.intrinsic  # its annotation describes the typing function, not the kernel's view


@_intrinsic
def typed_pointer(_typing: Any, address: Any, like: Any) -> Any:
    """An integer address (Tensor.data_ptr) as a pointer to elements of the type of `like`, for numba.carray."""
    if not isinstance(address, types.Integer):
        return None
    kind: Any = types.CPointer(like)  # type: ignore[no-untyped-call]
    return kind(address, like), lambda context, builder, _signature, args: builder.inttoptr(
        args[0], context.get_value_type(kind)
    )


@njit(inline="always", **_ROUNDED)
def _rounded(value: Any, array: Any) -> Any:
    """`value` as float32, after a stay in the element type of `array`."""
    return widen(narrow(value, array))


@njit(**_SUM)
def _sum_of_squares(x: Any) -> Any:
    """Σ_i x[i]² in float32."""
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        value = widen(x[i])
        total += value * value
    return total


@njit(**_ROUNDED)
def _normalise(out: Any, x: Any, weight: Any, eps: Any, offset: Any, rounds_first: Any) -> None:
    """out = (offset + weight) · x / √(mean(x²) + eps) for one row [dim]; with `rounds_first`, x̂ is rounded before."""
    dim = x.shape[0]
    scale = np.float32(1.0) / np.sqrt(_sum_of_squares(x) / np.float32(dim) + eps)
    if rounds_first:
        for i in range(dim):
            out[i] = narrow((offset + widen(weight[i])) * _rounded(widen(x[i]) * scale, out), out)
    else:
        for i in range(dim):
            out[i] = narrow((offset + widen(weight[i])) * (widen(x[i]) * scale), out)


def _rms_norm(out_at, x_at, weight_at, num_rows, dim, eps, offset, rounds_first, like):  # type: ignore[no-untyped-def]
    """`_normalise` for every row of x [num_rows, dim]; weight [dim]. `like` gives the type of the elements."""
    x = carray(typed_pointer(x_at, like), num_rows * dim)
    out = carray(typed_pointer(out_at, like), num_rows * dim)
    weight = carray(typed_pointer(weight_at, like), dim)
    for row in range(num_rows):
        begin = row * dim
        _normalise(out[begin : begin + dim], x[begin : begin + dim], weight, eps, offset, rounds_first)


@njit(**_ROUNDED)
def _rotate_head(out: Any, x: Any, cos: Any, sin: Any) -> None:
    """out = x · cos + rotate_half(x) · sin for one head of one token, [head_dim] each; three roundings as in torch."""
    half = x.shape[0] // 2
    for d in range(half):  # both halves in one loop: twice as fast as one after the other
        low, high = widen(x[d]), widen(x[d + half])
        straight, turned = _rounded(low * widen(cos[d]), out), _rounded(-high * widen(sin[d]), out)
        out[d] = narrow(straight + turned, out)
        straight, turned = _rounded(high * widen(cos[d + half]), out), _rounded(low * widen(sin[d + half]), out)
        out[d + half] = narrow(straight + turned, out)


@njit(**_ROUNDED)
def _rotate_token(t, out, x, head_stride, token_stride, num_heads, cos, sin):  # type: ignore[no-untyped-def]
    """Token t of out [num_tokens, num_heads, head_dim], dense; x lies at strides of its own."""
    head_dim = cos.shape[0]
    for h in range(num_heads):
        source, target = t * token_stride + h * head_stride, (t * num_heads + h) * head_dim
        _rotate_head(out[target : target + head_dim], x[source : source + head_dim], cos, sin)


def _rotary(  # type: ignore[no-untyped-def]
    q_out_at, k_out_at, q_at, k_at, cos_at, sin_at,
    q_head_stride, q_token_stride, k_head_stride, k_token_stride,
    num_tokens, num_heads, num_kv_heads, head_dim, like,
):  # fmt: skip
    """q [num_heads, num_tokens, head_dim] and k, strided, rotated by cos and sin [num_tokens, head_dim], dense."""
    q_out = carray(typed_pointer(q_out_at, like), num_tokens * num_heads * head_dim)
    k_out = carray(typed_pointer(k_out_at, like), num_tokens * num_kv_heads * head_dim)
    q = carray(typed_pointer(q_at, like), num_tokens * q_token_stride + num_heads * q_head_stride)
    k = carray(typed_pointer(k_at, like), num_tokens * k_token_stride + num_kv_heads * k_head_stride)
    cos = carray(typed_pointer(cos_at, like), num_tokens * head_dim)
    sin = carray(typed_pointer(sin_at, like), num_tokens * head_dim)
    for t in range(num_tokens):
        cos_row, sin_row = cos[t * head_dim : (t + 1) * head_dim], sin[t * head_dim : (t + 1) * head_dim]
        _rotate_token(t, q_out, q, q_head_stride, q_token_stride, num_heads, cos_row, sin_row)
        _rotate_token(t, k_out, k, k_head_stride, k_token_stride, num_kv_heads, cos_row, sin_row)


Kernel = Callable[..., None]


def _compiled(function: Kernel, arguments: tuple[Any, ...], dtype: torch.dtype) -> Kernel:
    """The entry point of a kernel for one dtype, with machine code kept on disk; the last argument is any number.

    Not by `numba_kernels.kernel`: its fastmath reaches into what it inlines.
    """
    try:
        dispatcher = njit(cache=True, **_ROUNDED)(function)
    except RuntimeError:  # no writable folder for the cache: compile in every process
        dispatcher = njit(**_ROUNDED)(function)
    return entry_point(dispatcher, (*arguments, from_dtype(STORAGE[dtype])))


@cache
def rms_norm(dtype: torch.dtype) -> Kernel:
    """Arguments as of `_rms_norm`."""
    numbers = (types.float32, types.float32, types.boolean)
    return _compiled(_rms_norm, (*[types.int64] * 5, *numbers), dtype)


@cache
def rotary(dtype: torch.dtype) -> Kernel:
    """Arguments as of `_rotary`."""
    return _compiled(_rotary, (types.int64,) * 14, dtype)
