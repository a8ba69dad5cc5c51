"""The numba kernel of CPU LoRA: one token of a step, for all modules of a group, one chunk of a ThreadTeam each.

One source serves float32 and bfloat16 (bf16.py). It reads raw addresses from one array of int64 fields, because making
numpy views and resolving types on each of some 120 calls a step costs more than the arithmetic of a small batch.
Nothing is checked inside.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from adapters.ops.bf16 import narrow, pointer, widen
from adapters.ops.bf16_dot import LANES, ROWS_AT_ONCE, dot_rows, is_supported, uses_dots
from adapters.ops.bf16_tile import MAX_ROWS, WIDTH, add_product
from adapters.ops.chunk_kernel import chunk_kernel
from adapters.ops.look_ahead import append, begin_plan, clear, fetch, plan_fields, take
from adapters.ops.numba_kernels import INLINED, OPTIONS
from adapters.ops.stack_memory import stack_memory
from adapters.ops.streamed_rows import COLUMNS, add_streamed_rows, dot_streamed_rows

(
    X,  # address of [num_tokens, in_features], rows X_STRIDE elements apart; it, y and the pools have one dtype
    X_STRIDE,
    STEP,  # int64 [NUM_STEP_FIELDS], what differs from step to step
    A_POOL,  # [num_modules, num_rows, in_features]
    RANKS,  # int32 [num_modules, num_rows]
    NUM_MODULES,
    NUM_ROWS,
    IN_FEATURES,
    NUM_THREADS,  # that share the chunks: a thread's next chunk is, as a rule, so many on
    MODULES,  # here the fields of each module begin
) = range(10)
(
    ROWS,  # address of int32 [num_served] the tokens served by the row kernel, one per chunk
    INDPTR,  # int32 [num_tokens + 1]
    STARTS,  # int32 [nnz]
    WEIGHTS,  # float32 [nnz]
    NUM_SERVED,
    TILES,  # int64 [num_tiles, TILE_FIELDS]: first token, number of tokens, first pool row
    TILE_WEIGHTS,  # float32 [num_tiles]
    NUM_STEP_FIELDS,
) = range(8)
B_POOL, Y, OUT_FEATURES, MODULE = range(4)  # [num_rows, out_features] and [num_tokens, out_features]
TILE_FIELDS = 3
_MANY = 2**40  # elements of an array whose length nobody asks for


@njit(**OPTIONS)
def _shrink_row(x_row: Any, a_row: Any) -> Any:
    """x · a in float32."""
    total = np.float32(0)
    for i in range(x_row.shape[0]):
        total += widen(x_row[i]) * widen(a_row[i])
    return total


@njit(**OPTIONS)
def _shrink(x_row: Any, a_rows: Any, shrunk: Any, plan: Any) -> None:
    """shrunk = x · a_rowsᵀ in float32. bfloat16 goes four ranks at once, its last features and ranks one by one.

    As much of the plan, which may be None, is asked for meanwhile.
    """
    num_ranks, in_features = a_rows.shape
    whole = in_features - in_features % LANES if uses_dots(x_row) else 0
    four = num_ranks - num_ranks % ROWS_AT_ONCE if whole else 0
    for r in range(0, four, ROWS_AT_ONCE):
        x_at, a_at, out = x_row.ctypes.data, a_rows[r].ctypes.data, shrunk[r:].ctypes.data
        if plan is None:
            dot_rows(x_at, a_at, 2 * in_features, whole, out)
        else:
            take(plan, ROWS_AT_ONCE * 2 * in_features)
            dot_streamed_rows(x_at, a_at, 2 * in_features, whole, out, plan.ctypes.data)
        for rest in range(r, r + ROWS_AT_ONCE):
            shrunk[rest] += _shrink_row(x_row[whole:], a_rows[rest, whole:])
    for r in range(four, num_ranks):
        if plan is not None:
            take(plan, in_features * a_rows.itemsize)
            fetch(plan.ctypes.data, in_features * a_rows.itemsize)
        shrunk[r] = _shrink_row(x_row, a_rows[r])


@njit(**INLINED)
def _shrink_entries(shrunk: Any, x_row: Any, a_pool: Any, ranks: Any, starts: Any, weights: Any, plan: Any) -> None:
    """shrunk = weight_e · (x · A_eᵀ), the entries e end to end."""
    at = 0
    for e in range(starts.shape[0]):
        rank = ranks[starts[e]]
        _shrink(x_row, a_pool[starts[e] : starts[e] + rank], shrunk[at : at + rank], plan)
        for r in range(at, at + rank):
            shrunk[r] *= weights[e]
        at += rank


@njit(**OPTIONS)
def _expand_columns(y: Any, shrunk: Any, b_pool: Any, ranks: Any, starts: Any, first: int) -> None:
    """y += Σ_e shrunk_e · B_e from column `first` on, one by one."""
    for o in range(first, y.shape[0]):
        total, at = widen(y[o]), 0
        for e in range(starts.shape[0]):
            for r in range(starts[e], starts[e] + ranks[starts[e]]):
                total += shrunk[at] * widen(b_pool[r, o])
                at += 1
        y[o] = narrow(total, y)


@njit(**INLINED)
def _expand_entries(y: Any, sums: Any, shrunk: Any, b_pool: Any, ranks: Any, starts: Any, plan: Any) -> None:
    """y += Σ_e shrunk_e · B_e, accumulated in float32, rounded once; four ranks at a time spare most of the way to and
    from `sums` [>= out_features]. As much of the plan is asked for meanwhile."""
    out_features, total_rank, at = y.shape[0], shrunk.shape[0], 0
    whole, row_bytes = out_features - out_features % COLUMNS, out_features * y.itemsize
    for e in range(starts.shape[0]):
        end = at + ranks[starts[e]]
        row = b_pool.ctypes.data + starts[e] * row_bytes
        while at < end:
            count = min(end - at, ROWS_AT_ONCE)
            take(plan, count * row_bytes)
            if whole > 0:
                add_streamed_rows(
                    y, count, shrunk.ctypes.data + 4 * at, row, row_bytes, whole,
                    y.ctypes.data, sums.ctypes.data, at == 0, at + count == total_rank, plan.ctypes.data,
                )  # fmt: skip
            at, row = at + count, row + count * row_bytes
    _expand_columns(y, shrunk, b_pool, ranks, starts, whole)


@njit(**INLINED)
def _total_rank(ranks: Any, starts: Any) -> Any:
    """Ranks of all entries' adapters in a module; 0 = none targets it."""
    total = np.int64(0)
    for e in range(starts.shape[0]):
        total += ranks[starts[e]]
    return total


@njit(**OPTIONS)
def _plan_token(plan: Any, fields: Any, ranks: Any, starts: Any, itemsize: int) -> None:
    """Append the rows of a token's adapters in the order in which they are computed."""
    a_bytes = fields[IN_FEATURES] * itemsize
    for module in range(ranks.shape[0]):
        at = MODULES + module * MODULE
        b_bytes, a_pool = fields[at + OUT_FEATURES] * itemsize, fields[A_POOL] + module * fields[NUM_ROWS] * a_bytes
        for e in range(starts.shape[0]):
            append(plan, a_pool + starts[e] * a_bytes, ranks[module, starts[e]] * a_bytes)
        for e in range(starts.shape[0]):
            append(plan, fields[at + B_POOL] + starts[e] * b_bytes, ranks[module, starts[e]] * b_bytes)


@njit(**OPTIONS)
def _starts(step: Any, chunk: int) -> Any:
    """Where the rows of the adapters of a chunk's token begin; none where there is no such chunk."""
    starts, indptr = carray(pointer(step[STARTS]), _MANY, np.int32), carray(pointer(step[INDPTR]), _MANY, np.int32)
    if chunk >= step[NUM_SERVED]:
        return starts[:0]
    token = carray(pointer(step[ROWS]), _MANY, np.int32)[chunk]
    return starts[indptr[token] : indptr[token + 1]]


@njit(**INLINED)
def _add_modules(
    fields: Any, token: int, x_row: Any, ranks: Any, starts: Any, weights: Any, plan: Any, scratch: int, kind: Any
) -> None:
    """The deltas of one token in all modules. `scratch` is the address of float32 [all entries' ranks + one output]."""
    num_rows, in_features = fields[NUM_ROWS], fields[IN_FEATURES]
    a_pools = carray(pointer(fields[A_POOL]), (ranks.shape[0], num_rows, in_features), kind)
    for module in range(ranks.shape[0]):
        at, total_rank = MODULES + module * MODULE, _total_rank(ranks[module], starts)
        if total_rank > 0:
            out_features = fields[at + OUT_FEATURES]
            b_pool = carray(pointer(fields[at + B_POOL]), (num_rows, out_features), kind)
            y = carray(pointer(fields[at + Y]), _MANY, kind)[token * out_features : (token + 1) * out_features]
            shrunk = carray(pointer(scratch), total_rank, np.float32)
            sums = carray(pointer(scratch + 4 * total_rank), out_features, np.float32)
            _shrink_entries(shrunk, x_row, a_pools[module], ranks[module], starts, weights, plan)
            _expand_entries(y, sums, shrunk, b_pool, ranks[module], starts, plan)


@njit(**OPTIONS)
def _add_token(arguments: int, chunk: int, kind: Any) -> None:
    """The deltas of one token; a module that none of its adapters targets keeps its bits."""
    fields = carray(pointer(arguments), _MANY, np.int64)
    step = carray(pointer(fields[STEP]), NUM_STEP_FIELDS, np.int64)
    if chunk >= step[NUM_SERVED]:  # a recorded call has a chunk for every row there may be
        return
    token = np.int64(carray(pointer(step[ROWS]), _MANY, np.int32)[chunk])
    begin = carray(pointer(step[INDPTR]), _MANY, np.int32)[token]
    starts, later = _starts(step, chunk), _starts(step, chunk + fields[NUM_THREADS])
    weights = carray(pointer(step[WEIGHTS]), _MANY, np.float32)[begin : begin + starts.shape[0]]
    in_features, num_modules = fields[IN_FEATURES], fields[NUM_MODULES]
    begin_x = token * fields[X_STRIDE]
    x_row = carray(pointer(fields[X]), _MANY, kind)[begin_x : begin_x + in_features]
    ranks = carray(pointer(fields[RANKS]), (num_modules, fields[NUM_ROWS]), np.int32)
    size = np.int64(0)
    for module in range(num_modules):
        size = max(size, _total_rank(ranks[module], starts) + fields[MODULES + module * MODULE + OUT_FEATURES])
    plan_size = plan_fields(2 * num_modules * (starts.shape[0] + later.shape[0]))
    plan = carray(pointer(stack_memory(8 * plan_size)), plan_size, np.int64)
    clear(plan)
    _plan_token(plan, fields, ranks, starts, x_row.itemsize)
    _plan_token(plan, fields, ranks, later, x_row.itemsize)
    begin_plan(plan, chunk >= fields[NUM_THREADS])
    _add_modules(fields, token, x_row, ranks, starts, weights, plan, stack_memory(4 * size), kind)


def tiles_fit(is_bf16: bool, out_features: Sequence[int]) -> bool:
    """Whether `add_tile_bf16` serves modules of these widths on this processor."""
    return is_bf16 and is_supported() and all(width % WIDTH == 0 for width in out_features)


@njit(**OPTIONS)
def _expand_tile(y: Any, shrunk: Any, b_rows: Any) -> None:
    """y [count, out_features], flat, += shrunk [count, ranks] · b_rows [ranks, out_features], ranks even.

    A function of its own, because numba frees an array after its last use by name, and addresses are no use.
    """
    (count, num_ranks), out_features = shrunk.shape, b_rows.shape[1]
    for first in range(0, count, MAX_ROWS):
        for column in range(0, out_features, WIDTH):
            add_product(
                min(MAX_ROWS, count - first), shrunk[first:].ctypes.data, 2 * num_ranks,
                b_rows.ctypes.data + 2 * column, 2 * out_features, num_ranks // 2,
                y[first * out_features + column :].ctypes.data, 2 * out_features,
            )  # fmt: skip


@njit(**OPTIONS)
def _add_tile(arguments: int, chunk: int) -> None:
    """The deltas of up to TILE tokens of one segment, bfloat16; the shrunk rows are rounded in between.

    Only where `tiles_fit`.
    """
    fields = carray(pointer(arguments), _MANY, np.int64)
    step = carray(pointer(fields[STEP]), NUM_STEP_FIELDS, np.int64)
    tile = carray(pointer(step[TILES]), _MANY, np.int64)[chunk * TILE_FIELDS : (chunk + 1) * TILE_FIELDS]
    begin, count, start = tile[0], tile[1], tile[2]
    weight = carray(pointer(step[TILE_WEIGHTS]), _MANY, np.float32)[chunk]
    in_features, num_rows, num_modules = fields[IN_FEATURES], fields[NUM_ROWS], fields[NUM_MODULES]
    x = carray(pointer(fields[X]), _MANY, np.uint16)
    a_pools = carray(pointer(fields[A_POOL]), (num_modules, num_rows, in_features), np.uint16)
    ranks = carray(pointer(fields[RANKS]), (num_modules, num_rows), np.int32)
    for module in range(num_modules):
        rank = np.int64(ranks[module, start])
        if rank == 0:
            continue
        at, padded = MODULES + module * MODULE, rank + rank % 2
        row = np.zeros(padded, np.float32)
        shrunk = np.empty((count, padded), np.uint16)
        for t in range(count):
            begin_x = (begin + t) * fields[X_STRIDE]
            _shrink(x[begin_x : begin_x + in_features], a_pools[module, start : start + rank], row[:rank], None)
            for r in range(padded):
                shrunk[t, r] = narrow(row[r] * weight, shrunk)
        out_features = fields[at + OUT_FEATURES]
        pool = carray(pointer(fields[at + B_POOL]), (num_rows, out_features), np.uint16)
        y = carray(pointer(fields[at + Y]), _MANY, np.uint16)[begin * out_features :]
        b_rows = pool[start : start + rank]
        if padded != rank:  # the row after an odd rank is another adapter's, or nobody's: 0 times that may be NaN
            copy = np.zeros((padded, out_features), np.uint16)
            copy[:rank] = b_rows
            b_rows = copy
        _expand_tile(y, shrunk, b_rows)


@chunk_kernel(**OPTIONS)
def add_tile_bf16(arguments, chunk):  # type: ignore[no-untyped-def]
    _add_tile(arguments, chunk)


@chunk_kernel(**OPTIONS)
def add_bf16(arguments, chunk):  # type: ignore[no-untyped-def]
    _add_token(arguments, chunk, np.uint16)


@chunk_kernel(**OPTIONS)
def add_f32(arguments, chunk):  # type: ignore[no-untyped-def]
    _add_token(arguments, chunk, np.float32)
