"""The LoRA operation on CPU: a numba kernel for single rows (decode), matrix products in place for segments (prefill).

One kernel source serves float32 and bfloat16 (see bf16.py). It is called through its compiled entry point with the raw
addresses of x and y, because making numpy views and resolving types on each of some 200 calls a step costs more than
the arithmetic of a small batch. Nothing is checked inside: `check_tokens` and `LoRABatch.build` stand before it.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numba
import numpy as np
import torch
from numba import prange, types
from numba.np.numpy_support import carray, from_dtype
from torch import Tensor

from adapters.lora_batch import LoRABatch, Segment
from adapters.ops.bf16 import STORAGE, as_numpy, narrow, pointer, widen
from adapters.ops.interface import LoRAPools, check_tokens
from adapters.ops.numba_kernels import OPTIONS, available_threads, entry_point, kernel, use_threads

PARALLEL_WIDTH = 4096
"""Rows · (in_features + out_features) from which two threads pay for their barrier (about 3 µs) at rank 16."""


@numba.njit(**OPTIONS)
def _add_row(y, x, a_pool, b_pool, ranks, starts, weights):  # type: ignore[no-untyped-def]
    """y += Σ_e weight_e · (x · Aᵀ) · B for one token, accumulated in float32, rounded once."""
    in_features, out_features = a_pool.shape[1], b_pool.shape[1]
    x_row = np.empty(in_features, np.float32)
    for i in range(in_features):
        x_row[i] = widen(x[i])
    total = np.empty(out_features, np.float32)
    for o in range(out_features):
        total[o] = widen(y[o])
    for e in range(starts.shape[0]):
        start = starts[e]
        for r in range(start, start + ranks[start]):
            shrunk = np.float32(0)
            for i in range(in_features):
                shrunk += x_row[i] * widen(a_pool[r, i])
            shrunk *= weights[e]
            for o in range(out_features):
                total[o] += shrunk * widen(b_pool[r, o])
    for o in range(out_features):
        y[o] = narrow(total[o], y)


@numba.njit(**OPTIONS)
def _add_token(t, y, x, x_stride, a_pool, b_pool, ranks, indptr, starts, weights):  # type: ignore[no-untyped-def]
    """Row t of flat y and x, unless no adapter of the token has a rank in this module."""
    in_features, out_features = a_pool.shape[1], b_pool.shape[1]
    begin, end = indptr[t], indptr[t + 1]
    targeted = False
    for e in range(begin, end):
        targeted = targeted or ranks[starts[e]] > 0
    if targeted:
        y_row = y[t * out_features : (t + 1) * out_features]
        x_row = x[t * x_stride : t * x_stride + in_features]
        _add_row(y_row, x_row, a_pool, b_pool, ranks, starts[begin:end], weights[begin:end])


@kernel()
def _add_rows(y_at, x_at, x_stride, a_pool, b_pool, ranks, rows, indptr, starts, weights):  # type: ignore[no-untyped-def]
    """y[t] += Σ_e weight_e · (x[t] · Aᵀ) · B for t in rows."""
    num_tokens = indptr.shape[0] - 1
    y = carray(pointer(y_at), num_tokens * b_pool.shape[1], b_pool.dtype)
    x = carray(pointer(x_at), num_tokens * x_stride, a_pool.dtype)
    for i in range(rows.shape[0]):
        _add_token(np.int64(rows[i]), y, x, x_stride, a_pool, b_pool, ranks, indptr, starts, weights)


@kernel(parallel=True)
def _add_rows_parallel(y_at, x_at, x_stride, a_pool, b_pool, ranks, rows, indptr, starts, weights):  # type: ignore[no-untyped-def]
    """`_add_rows` with the rows shared out among threads; each row of y belongs to one thread."""
    num_tokens = indptr.shape[0] - 1
    y = carray(pointer(y_at), num_tokens * b_pool.shape[1], b_pool.dtype)
    x = carray(pointer(x_at), num_tokens * x_stride, a_pool.dtype)
    for i in prange(rows.shape[0]):
        _add_token(np.int64(rows[i]), y, x, x_stride, a_pool, b_pool, ranks, indptr, starts, weights)


@cache
def _compiled(dtype: torch.dtype, parallel: bool) -> Callable[..., None]:
    pool = types.Array(from_dtype(STORAGE[dtype]), 2, "C")
    ints, floats = types.Array(types.int32, 1, "C"), types.Array(types.float32, 1, "C")
    addresses = (types.int64, types.int64, types.int64)
    signature = (*addresses, pool, pool, ints, ints, ints, ints, floats)
    return entry_point(_add_rows_parallel if parallel else _add_rows, signature)


class CPULoRA:
    """One group's pools with their numpy views, taken once because pools never move."""

    __slots__ = ("_modules", "_num_threads", "_parallel", "_parallel_rows", "_pools", "_serial")

    def __init__(self, pools: LoRAPools) -> None:
        dtype = pools.a_pool.dtype
        if dtype not in STORAGE:
            raise ValueError(f"LoRA pools of {dtype} cannot be served on CPU: load the base in bfloat16 or float32")
        self._pools = pools
        a_views, ranks = as_numpy(pools.a_pool), pools.ranks.numpy()
        self._modules = [(a_views[m], as_numpy(b_pool), ranks[m]) for m, b_pool in enumerate(pools.b_pools)]
        self._num_threads = available_threads()
        self._serial = _compiled(dtype, False)
        self._parallel = _compiled(dtype, True) if self._num_threads > 1 else self._serial
        self._parallel_rows = [max(2, -(-PARALLEL_WIDTH // (pools.in_features + out))) for out in pools.out_features]

    def add(self, ys: Sequence[Tensor], x: Tensor, batch: LoRABatch) -> None:
        """y_m[t] += Σ_e weight_e · (x[t] · A_mᵀ) · B_m for the tokens that have entries; the rest keep their bits."""
        dtype, in_features = self._pools.a_pool.dtype, self._pools.in_features
        check_tokens(ys, x, batch.num_tokens, self._pools)
        if x.dtype is not dtype or any(y.dtype is not dtype or not y.is_contiguous() for y in ys):
            raise RuntimeError(f"LoRA pools of {dtype} met x of {x.dtype} and y of {ys[0].dtype}; y must be contiguous")
        x_stride = in_features
        if not x.is_contiguous():
            x = _dense_rows(x)
            x_stride = x.stride(0)
        if len(batch.rows):
            for module, y in enumerate(ys):
                self._add_rows(module, y, x, x_stride, batch)
        if batch.segments:
            x_rows = x.view(-1, in_features)
            for module, y in enumerate(ys):
                for segment in batch.segments:
                    self._add_segment(module, y.view(-1, y.shape[-1]), x_rows, segment)

    def _add_rows(self, module: int, y: Tensor, x: Tensor, x_stride: int, batch: LoRABatch) -> None:
        run = self._serial
        if self._num_threads > 1 and len(batch.rows) >= self._parallel_rows[module]:
            use_threads(self._num_threads)
            run = self._parallel
        step = (batch.rows, batch.indptr, batch.starts, batch.weights)
        run(y.data_ptr(), x.data_ptr(), x_stride, *self._modules[module], *step)

    def _add_segment(self, module: int, y: Tensor, x: Tensor, segment: Segment) -> None:
        """y[begin:end] += weight · (x[begin:end] · Aᵀ) · B; the shrunk rows are rounded to x's dtype in between."""
        end = segment.start + int(self._modules[module][2][segment.start])
        if end == segment.start:
            return
        shrunk = x[segment.begin : segment.end] @ self._pools.a_pool[module, segment.start : end].T  # [n, r]
        b_rows = self._pools.b_pools[module][segment.start : end]
        y[segment.begin : segment.end].addmm_(shrunk, b_rows, alpha=segment.weight)


def _dense_rows(x: Tensor) -> Tensor:
    """x as [num_tokens, in_features] with adjacent elements in a row; a copy only when its strides leave no view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def bind(pools: LoRAPools) -> CPULoRA:
    return CPULoRA(pools)


def stage(batch: LoRABatch) -> LoRABatch:
    return batch
