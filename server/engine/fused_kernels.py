"""The numba kernels of the small operations between the linears: RMSNorm and rotary embedding.

One pass over memory each, rounded where the models' own chains of torch operations round, so that nearly every bit is
theirs. Elements are bf16 as uint16 bits or float32 as it is (adapters/ops/bf16.py), reached through raw addresses.
Knows nothing of modules and checks nothing: whoever calls stands for dtypes, shapes and strides.
"""

# mypy: disallow-untyped-decorators=False
# numba's decorators are untyped and would make every kernel an error.

from typing import Any

import numpy as np
import torch
from numba import njit
from numba.np.numpy_support import carray

from adapters.ops.bf16 import narrow, pointer, widen
from adapters.ops.chunk_kernel import chunk_kernel

# Sums may be reordered; products that models round one by one may not be contracted into one rounding.
_SUM: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy", "nogil": True}
_ROUNDED: dict[str, Any] = {"error_model": "numpy", "nogil": True}

CHUNK = 4096
"""Elements a chunk has, at least, when there are as many."""

_MANY = 2**40  # elements of an array whose length nobody asks for


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


(
    NORM_OUT,  # address of [num_rows, dim]
    NORM_X,  # [num_rows, dim]
    NORM_WEIGHT,  # [dim]
    NORM_ROWS,
    NORM_DIM,
    NORM_ROWS_PER_CHUNK,
    NORM_ROUNDS_FIRST,
    NORM_NUMBERS,  # float32 [2]: eps and offset, in the place of one field
    NORM_FIELDS,
) = range(9)


@njit(**_ROUNDED)
def _rms_norm(arguments: int, chunk: int, kind: Any) -> None:
    """`_normalise` for the rows of a chunk."""
    fields = carray(pointer(arguments), NORM_FIELDS, np.int64)
    numbers = carray(pointer(arguments + 8 * NORM_NUMBERS), 2, np.float32)
    dim, rows = fields[NORM_DIM], fields[NORM_ROWS_PER_CHUNK]
    x = carray(pointer(fields[NORM_X]), _MANY, kind)
    out = carray(pointer(fields[NORM_OUT]), _MANY, kind)
    weight = carray(pointer(fields[NORM_WEIGHT]), dim, kind)
    for row in range(chunk * rows, min((chunk + 1) * rows, fields[NORM_ROWS])):
        here = slice(row * dim, (row + 1) * dim)
        _normalise(out[here], x[here], weight, numbers[0], numbers[1], fields[NORM_ROUNDS_FIRST] != 0)


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


(
    Q_OUT,  # address of [num_tokens, num_heads, head_dim], dense
    K_OUT,  # [num_tokens, num_kv_heads, head_dim], dense
    Q,  # of the same shapes, at strides of their own
    K,
    COS,  # [num_tokens, head_dim]
    SIN,
    Q_HEAD_STRIDE,
    Q_TOKEN_STRIDE,
    K_HEAD_STRIDE,
    K_TOKEN_STRIDE,
    NUM_TOKENS,
    NUM_HEADS,
    NUM_KV_HEADS,
    HEAD_DIM,
    TOKENS_PER_CHUNK,
    ROTARY_FIELDS,
) = range(16)


@njit(**_ROUNDED)
def _rotary(arguments: int, chunk: int, kind: Any) -> None:
    """q and k of the tokens of a chunk, rotated by cos and sin."""
    fields = carray(pointer(arguments), ROTARY_FIELDS, np.int64)
    q_out, k_out = carray(pointer(fields[Q_OUT]), _MANY, kind), carray(pointer(fields[K_OUT]), _MANY, kind)
    q, k = carray(pointer(fields[Q]), _MANY, kind), carray(pointer(fields[K]), _MANY, kind)
    cos, sin = carray(pointer(fields[COS]), _MANY, kind), carray(pointer(fields[SIN]), _MANY, kind)
    head_dim, tokens = fields[HEAD_DIM], fields[TOKENS_PER_CHUNK]
    for t in range(chunk * tokens, min((chunk + 1) * tokens, fields[NUM_TOKENS])):
        cos_row, sin_row = cos[t * head_dim : (t + 1) * head_dim], sin[t * head_dim : (t + 1) * head_dim]
        q_strides, k_strides = fields[Q_HEAD_STRIDE : Q_HEAD_STRIDE + 2], fields[K_HEAD_STRIDE : K_HEAD_STRIDE + 2]
        _rotate_token(t, q_out, q, q_strides[0], q_strides[1], fields[NUM_HEADS], cos_row, sin_row)
        _rotate_token(t, k_out, k, k_strides[0], k_strides[1], fields[NUM_KV_HEADS], cos_row, sin_row)


(ADD_OUT, ADD_LEFT, ADD_RIGHT, ADD_SIZE, ADD_FIELDS) = range(5)  # addresses of [size], and the size


@njit(**_ROUNDED)
def _add(arguments: int, chunk: int, kind: Any) -> None:
    """out = left + right over the CHUNK elements of a chunk, in float32, rounded once."""
    fields = carray(pointer(arguments), ADD_FIELDS, np.int64)
    begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, fields[ADD_SIZE])
    out = carray(pointer(fields[ADD_OUT]), end, kind)
    left, right = carray(pointer(fields[ADD_LEFT]), end, kind), carray(pointer(fields[ADD_RIGHT]), end, kind)
    for i in range(begin, end):
        out[i] = narrow(widen(left[i]) + widen(right[i]), out)


@chunk_kernel(**_ROUNDED)
def _rms_norm_bf16(arguments, chunk):  # type: ignore[no-untyped-def]
    _rms_norm(arguments, chunk, np.uint16)


@chunk_kernel(**_ROUNDED)
def _rms_norm_f32(arguments, chunk):  # type: ignore[no-untyped-def]
    _rms_norm(arguments, chunk, np.float32)


@chunk_kernel(**_ROUNDED)
def _rotary_bf16(arguments, chunk):  # type: ignore[no-untyped-def]
    _rotary(arguments, chunk, np.uint16)


@chunk_kernel(**_ROUNDED)
def _rotary_f32(arguments, chunk):  # type: ignore[no-untyped-def]
    _rotary(arguments, chunk, np.float32)


@chunk_kernel(**_ROUNDED)
def _add_bf16(arguments, chunk):  # type: ignore[no-untyped-def]
    _add(arguments, chunk, np.uint16)


@chunk_kernel(**_ROUNDED)
def _add_f32(arguments, chunk):  # type: ignore[no-untyped-def]
    _add(arguments, chunk, np.float32)


RMS_NORM = {torch.bfloat16: _rms_norm_bf16, torch.float32: _rms_norm_f32}
ROTARY = {torch.bfloat16: _rotary_bf16, torch.float32: _rotary_f32}
ADD = {torch.bfloat16: _add_bf16, torch.float32: _add_f32}
"""Chunk kernels by dtype."""
