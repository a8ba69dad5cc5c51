"""The numba kernel of the affine operation on CPU: a few tokens of a step, for all modules of a group, a chunk.

One source serves float32 and bfloat16 (bf16.py), and reads raw addresses like that of LoRA (cpu_kernels.py). Nothing is
checked inside.
"""

from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from adapters.ops.bf16 import narrow, pointer, widen
from adapters.ops.chunk_kernel import chunk_kernel
from adapters.ops.numba_kernels import OPTIONS
from adapters.ops.stack_memory import stack_memory

(
    STEP,  # address of int64 [NUM_STEP_FIELDS], what differs from step to step
    NUM_MODULES,
    TOKENS_PER_CHUNK,
    MAX_WIDTH,  # of the modules
    MODULES,  # here the fields of each module begin
) = range(5)
(
    TOKENS,  # address of int32 [num_affine] the tokens with vectors somewhere
    NUM_AFFINE,
    INDPTR,  # int32 [num_tokens + 1]
    STARTS,  # int32 [nnz]
    WEIGHTS,  # float32 [nnz]
    NUM_STEP_FIELDS,
) = range(6)
(
    TABLE,  # address of int64 [num_rows], where vectors float32 [2, width] lie by first pool row; 0 = nowhere
    Y,  # [num_tokens, ROWS, WIDTH]
    WIDTH,
    ROWS,
    MODULE,
) = range(5)
_MANY = 2**40  # elements of an array whose length nobody asks for


@njit(**OPTIONS)
def _correct_by_one(y: Any, gain: Any, shift: Any, weight: Any) -> None:
    """y [rows · width] = y ⊙ (1 + weight · gain) + weight · shift, both [width]."""
    width = gain.shape[0]
    for begin in range(0, y.shape[0], width):
        row = y[begin : begin + width]
        for i in range(width):
            row[i] = narrow(widen(row[i]) * (np.float32(1) + weight * gain[i]) + weight * shift[i], row)


@njit(**OPTIONS)
def _sum(sums: Any, table: Any, starts: Any, weights: Any) -> None:
    """sums [2 · width] = Σ_e weight_e · (d_e, c_e) over the entries that have vectors."""
    sums[:] = np.float32(0)
    for e in range(starts.shape[0]):
        if table[starts[e]] != 0:
            vectors = carray(pointer(table[starts[e]]), sums.shape[0], np.float32)
            for i in range(sums.shape[0]):
                sums[i] += weights[e] * vectors[i]


@njit(**OPTIONS)
def _num_entries(table: Any, starts: Any) -> Any:
    """Entries with vectors in a module."""
    found = np.int64(0)
    for e in range(starts.shape[0]):
        found += table[starts[e]] != 0
    return found


@njit(**OPTIONS)
def _correct_token(fields: Any, token: int, starts: Any, weights: Any, sums: Any, kind: Any) -> None:
    """All modules of one token; where none of its adapters has vectors, bits stay. `sums` is room for [2 · widest]."""
    for module in range(fields[NUM_MODULES]):
        at = MODULES + module * MODULE
        table = carray(pointer(fields[at + TABLE]), _MANY, np.int64)
        count, width = _num_entries(table, starts), fields[at + WIDTH]
        if count == 0:
            continue
        size = fields[at + ROWS] * width
        y = carray(pointer(fields[at + Y]), _MANY, kind)[token * size : (token + 1) * size]
        if count == 1 and starts.shape[0] == 1:
            vectors = carray(pointer(table[starts[0]]), 2 * width, np.float32)
            _correct_by_one(y, vectors[:width], vectors[width:], weights[0])
        else:
            _sum(sums[: 2 * width], table, starts, weights)
            _correct_by_one(y, sums[:width], sums[width : 2 * width], np.float32(1))


@njit(**OPTIONS)
def _correct(arguments: int, chunk: int, kind: Any) -> None:
    """The tokens of one chunk."""
    fields = carray(pointer(arguments), _MANY, np.int64)
    step = carray(pointer(fields[STEP]), NUM_STEP_FIELDS, np.int64)
    first = chunk * fields[TOKENS_PER_CHUNK]
    if first >= step[NUM_AFFINE]:  # a recorded call has chunks for every row there may be
        return
    tokens, indptr = carray(pointer(step[TOKENS]), _MANY, np.int32), carray(pointer(step[INDPTR]), _MANY, np.int32)
    starts, weights = carray(pointer(step[STARTS]), _MANY, np.int32), carray(pointer(step[WEIGHTS]), _MANY, np.float32)
    sums = carray(pointer(stack_memory(8 * fields[MAX_WIDTH])), 2 * fields[MAX_WIDTH], np.float32)
    for i in range(first, min(first + fields[TOKENS_PER_CHUNK], step[NUM_AFFINE])):
        token = np.int64(tokens[i])
        begin, end = indptr[token], indptr[token + 1]
        _correct_token(fields, token, starts[begin:end], weights[begin:end], sums, kind)


@chunk_kernel(**OPTIONS)
def affine_bf16(arguments, chunk):  # type: ignore[no-untyped-def]
    _correct(arguments, chunk, np.uint16)


@chunk_kernel(**OPTIONS)
def affine_f32(arguments, chunk):  # type: ignore[no-untyped-def]
    _correct(arguments, chunk, np.float32)
