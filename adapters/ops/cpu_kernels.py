"""The numba kernel of CPU LoRA: one token of a step, for all modules of a group, one chunk of a ThreadTeam each.

One source serves float32 and bfloat16 (bf16.py). It reads raw addresses from one array of int64 fields, because making
numpy views and resolving types on each of some 120 calls a step costs more than the arithmetic of a small batch.
Nothing is checked inside.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from adapters.ops.bf16 import narrow, pointer, widen
from adapters.ops.numba_kernels import OPTIONS
from adapters.ops.thread_team import chunk_kernel

(
    X,  # address of [num_tokens, in_features], rows X_STRIDE elements apart; it, y and the pools have one dtype
    X_STRIDE,
    ROWS,  # int32 [num_chunks] the tokens served, one per chunk
    INDPTR,  # int32 [num_tokens + 1]
    STARTS,  # int32 [nnz]
    WEIGHTS,  # float32 [nnz]
    A_POOL,  # [num_modules, num_rows, in_features]
    RANKS,  # int32 [num_modules, num_rows]
    NUM_MODULES,
    NUM_ROWS,
    IN_FEATURES,
    MODULES,  # here the fields of each module begin
) = range(12)
B_POOL, Y, OUT_FEATURES, MODULE = range(4)  # [num_rows, out_features] and [num_tokens, out_features]
_MANY = 2**40  # elements of an array whose length nobody asks for


@njit(**OPTIONS)
def _add_row(y: Any, x_row: Any, a_pool: Any, b_pool: Any, ranks: Any, starts: Any, weights: Any) -> None:
    """y += Σ_e weight_e · (x · Aᵀ) · B for one token and module, accumulated in float32, rounded once."""
    in_features, out_features = a_pool.shape[1], b_pool.shape[1]
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


@njit(**OPTIONS)
def _targets(ranks: Any, starts: Any) -> bool:
    """Whether any entry's adapter has a rank in the module."""
    found = False
    for e in range(starts.shape[0]):
        found = found or ranks[starts[e]] > 0
    return found


@njit(**OPTIONS)
def _add_token(arguments: int, chunk: int, kind: Any) -> None:
    """The deltas of one token; a module that none of its adapters targets keeps its bits."""
    fields = carray(pointer(arguments), _MANY, np.int64)
    token = np.int64(carray(pointer(fields[ROWS]), _MANY, np.int32)[chunk])
    indptr = carray(pointer(fields[INDPTR]), _MANY, np.int32)
    begin, end = indptr[token], indptr[token + 1]
    starts = carray(pointer(fields[STARTS]), _MANY, np.int32)[begin:end]
    weights = carray(pointer(fields[WEIGHTS]), _MANY, np.float32)[begin:end]
    in_features, num_rows, num_modules = fields[IN_FEATURES], fields[NUM_ROWS], fields[NUM_MODULES]
    x = carray(pointer(fields[X]), _MANY, kind)[token * fields[X_STRIDE] :]
    x_row = np.empty(in_features, np.float32)
    for i in range(in_features):
        x_row[i] = widen(x[i])
    a_pools = carray(pointer(fields[A_POOL]), (num_modules, num_rows, in_features), kind)
    ranks = carray(pointer(fields[RANKS]), (num_modules, num_rows), np.int32)
    for module in range(num_modules):
        if _targets(ranks[module], starts):
            at = MODULES + module * MODULE
            out_features = fields[at + OUT_FEATURES]
            b_pool = carray(pointer(fields[at + B_POOL]), (num_rows, out_features), kind)
            y = carray(pointer(fields[at + Y]), _MANY, kind)[token * out_features : (token + 1) * out_features]
            _add_row(y, x_row, a_pools[module], b_pool, ranks[module], starts, weights)


@chunk_kernel(**OPTIONS)
def add_bf16(arguments, chunk):  # type: ignore[no-untyped-def]
    _add_token(arguments, chunk, np.uint16)


@chunk_kernel(**OPTIONS)
def add_f32(arguments, chunk):  # type: ignore[no-untyped-def]
    _add_token(arguments, chunk, np.float32)
