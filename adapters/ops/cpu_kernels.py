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
from adapters.ops.bf16_dot import LANES, ROWS_AT_ONCE, dot_rows, is_supported, prefetch, uses_dots
from adapters.ops.bf16_tile import MAX_ROWS, WIDTH, add_product
from adapters.ops.numba_kernels import OPTIONS
from adapters.ops.thread_team import chunk_kernel

(
    X,  # address of [num_tokens, in_features], rows X_STRIDE elements apart; it, y and the pools have one dtype
    X_STRIDE,
    STEP,  # int64 [NUM_STEP_FIELDS], what differs from step to step
    A_POOL,  # [num_modules, num_rows, in_features]
    RANKS,  # int32 [num_modules, num_rows]
    NUM_MODULES,
    NUM_ROWS,
    IN_FEATURES,
    MODULES,  # here the fields of each module begin
) = range(9)
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
def _shrink(x_row: Any, a_rows: Any, shrunk: Any) -> None:
    """shrunk = x · a_rowsᵀ in float32. bfloat16 goes four ranks at once, its last features and ranks one by one."""
    num_ranks, in_features = a_rows.shape
    whole = in_features - in_features % LANES if uses_dots(x_row) else 0
    four = num_ranks - num_ranks % ROWS_AT_ONCE if whole else 0
    for r in range(0, four, ROWS_AT_ONCE):
        dot_rows(x_row.ctypes.data, a_rows[r].ctypes.data, 2 * in_features, whole, shrunk[r:].ctypes.data)
        for rest in range(r, r + ROWS_AT_ONCE):
            shrunk[rest] += _shrink_row(x_row[whole:], a_rows[rest, whole:])
    for r in range(four, num_ranks):
        shrunk[r] = _shrink_row(x_row, a_rows[r])


@njit(**OPTIONS)
def _expand(total: Any, shrunk: Any, b_rows: Any) -> None:
    """total += shrunk · B in float32; four ranks at a time: a quarter of the loads and stores of `total`."""
    num_ranks, out_features = b_rows.shape
    four = num_ranks - num_ranks % 4
    for r in range(0, four, 4):
        sa, sb, sc, sd = shrunk[r], shrunk[r + 1], shrunk[r + 2], shrunk[r + 3]
        for o in range(out_features):
            near = sa * widen(b_rows[r, o]) + sb * widen(b_rows[r + 1, o])
            far = sc * widen(b_rows[r + 2, o]) + sd * widen(b_rows[r + 3, o])
            total[o] += near + far
    for r in range(four, num_ranks):
        for o in range(out_features):
            total[o] += shrunk[r] * widen(b_rows[r, o])


@njit(**OPTIONS)
def _shrink_entries(shrunk: Any, x_row: Any, a_pool: Any, ranks: Any, starts: Any, weights: Any) -> None:
    """shrunk = weight_e · (x · A_eᵀ), the entries e end to end."""
    at = 0
    for e in range(starts.shape[0]):
        rank = ranks[starts[e]]
        _shrink(x_row, a_pool[starts[e] : starts[e] + rank], shrunk[at : at + rank])
        for r in range(at, at + rank):
            shrunk[r] *= weights[e]
        at += rank


@njit(**OPTIONS)
def _expand_entries(y: Any, shrunk: Any, b_pool: Any, ranks: Any, starts: Any) -> None:
    """y += Σ_e shrunk_e · B_e, accumulated in float32, rounded once."""
    total = np.empty(y.shape[0], np.float32)
    for o in range(y.shape[0]):
        total[o] = widen(y[o])
    at = 0
    for e in range(starts.shape[0]):
        rank = ranks[starts[e]]
        _expand(total, shrunk[at : at + rank], b_pool[starts[e] : starts[e] + rank])
        at += rank
    for o in range(y.shape[0]):
        y[o] = narrow(total[o], y)


@njit(**OPTIONS)
def _total_rank(ranks: Any, starts: Any) -> Any:
    """Ranks of all entries' adapters in a module; 0 = none targets it."""
    total = np.int64(0)
    for e in range(starts.shape[0]):
        total += ranks[starts[e]]
    return total


@njit(**OPTIONS)
def _fetch(pool: Any, ranks: Any, starts: Any) -> None:
    """Ask for the rows that a token's adapters have in a pool. They come from memory in short stretches, which the
    processor does not foresee; asked for ahead, they arrive while the rows before them are computed."""
    for e in range(starts.shape[0]):
        rank = ranks[starts[e]]
        if rank > 0:
            prefetch(pool[starts[e]].ctypes.data, rank * pool.shape[1] * pool.itemsize)


@njit(**OPTIONS)
def _add_token(arguments: int, chunk: int, kind: Any) -> None:
    """The deltas of one token; a module that none of its adapters targets keeps its bits."""
    fields = carray(pointer(arguments), _MANY, np.int64)
    step = carray(pointer(fields[STEP]), NUM_STEP_FIELDS, np.int64)
    if chunk >= step[NUM_SERVED]:  # a recorded call has a chunk for every row there may be
        return
    token = np.int64(carray(pointer(step[ROWS]), _MANY, np.int32)[chunk])
    indptr = carray(pointer(step[INDPTR]), _MANY, np.int32)
    begin, end = indptr[token], indptr[token + 1]
    starts = carray(pointer(step[STARTS]), _MANY, np.int32)[begin:end]
    weights = carray(pointer(step[WEIGHTS]), _MANY, np.float32)[begin:end]
    in_features, num_rows, num_modules = fields[IN_FEATURES], fields[NUM_ROWS], fields[NUM_MODULES]
    begin_x = token * fields[X_STRIDE]
    x_row = carray(pointer(fields[X]), _MANY, kind)[begin_x : begin_x + in_features]
    a_pools = carray(pointer(fields[A_POOL]), (num_modules, num_rows, in_features), kind)
    ranks = carray(pointer(fields[RANKS]), (num_modules, num_rows), np.int32)
    _fetch(a_pools[0], ranks[0], starts)
    for module in range(num_modules):
        at, total_rank = MODULES + module * MODULE, _total_rank(ranks[module], starts)
        out_features = fields[at + OUT_FEATURES]
        b_pool = carray(pointer(fields[at + B_POOL]), (num_rows, out_features), kind)
        shrunk = np.empty(total_rank, np.float32)
        _fetch(b_pool, ranks[module], starts)
        _shrink_entries(shrunk, x_row, a_pools[module], ranks[module], starts, weights)
        if module + 1 < num_modules:
            _fetch(a_pools[module + 1], ranks[module + 1], starts)
        if total_rank > 0:
            y = carray(pointer(fields[at + Y]), _MANY, kind)[token * out_features : (token + 1) * out_features]
            _expand_entries(y, shrunk, b_pool, ranks[module], starts)


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
            _shrink(x[begin_x : begin_x + in_features], a_pools[module, start : start + rank], row[:rank])
            for r in range(padded):
                shrunk[t, r] = narrow(row[r] * weight, shrunk)
        out_features = fields[at + OUT_FEATURES]
        pool = carray(pointer(fields[at + B_POOL]), (num_rows, out_features), np.uint16)
        y = carray(pointer(fields[at + Y]), _MANY, np.uint16)[begin * out_features :]
        if padded == rank:
            _expand_tile(y, shrunk, pool[start : start + rank])
        else:  # the row after an odd rank is another adapter's, or nobody's: 0 times that may be NaN
            b_rows = np.zeros((padded, out_features), np.uint16)
            b_rows[:rank] = pool[start : start + rank]
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
