"""The numba kernel of CPU attention for rows with several new tokens, by the processor's bfloat16 dot product.

One chunk of a ThreadTeam is a few new tokens of one row for the heads that read one KV head: keys and values are
gathered from their blocks once, scores are dot products, and the weights, rounded to bfloat16, meet the values in the
inner loop of our linears. A token's result depends on its own context alone, not on how a prompt was cut into steps.
Causal attention only, without window, softcap or sinks, and only where `bf16_dot.is_supported`.
"""

from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from adapters.ops.bf16 import narrow, pointer
from adapters.ops.bf16_dot import LANES, ROWS_AT_ONCE, dot_rows
from adapters.ops.bf16_tile import MAX_ROWS, WIDTH, add_product
from adapters.ops.chunk_kernel import chunk_kernel
from server.engine.attention.cpu_kernels import (
    BLOCK_SIZE,
    BLOCK_TABLES,
    HEAD_DIM,
    K_CACHE,
    MAX_BLOCKS,
    NUM_FIELDS,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_SLOTS,
    NUM_STEP_FIELDS,
    NUM_TOKENS,
    NUMBERS,
    OUT,
    PIECES,
    SCALE,
    STEP,
    V_CACHE,
    V_HEAD_DIM,
    Q,
)
from server.engine.fast_exp import EXACT, exp

QUERIES = 16
"""New tokens of a chunk."""

PIECE_FIELDS = 4
"""A piece is its row, its first token in the batch, its number of tokens, and the keys its first token sees."""


def suits(head_dim: int, v_head_dim: int) -> bool:
    """Whether heads of these sizes fit the inner loops."""
    return head_dim % LANES == 0 and v_head_dim % WIDTH == 0


@njit(**EXACT)
def _gather(cache: Any, block_table: Any, block_size: int, head: int, length: int, padded: int) -> Any:
    """[padded, dim] the first `length` tokens of one KV head; zeros after them."""
    rows = np.zeros((padded, cache.shape[2]), np.uint16)
    for t in range(length):
        slot = np.int64(block_table[t // block_size]) * block_size + t % block_size
        for d in range(cache.shape[2]):
            rows[t, d] = cache[slot, head, d]
    return rows


@njit(**EXACT)
def _weigh(weights: Any, q: Any, keys: Any, visible: int, scores: Any, scale: Any) -> None:
    """weights [padded] = softmax(scale · q · keysᵀ) over the first `visible` keys, bfloat16; 0 after them."""
    dim = keys.shape[1]
    for t in range(0, visible, ROWS_AT_ONCE):
        dot_rows(q.ctypes.data, keys[t].ctypes.data, 2 * dim, dim, scores[t:].ctypes.data)
    checksum = np.float32(0.0)  # 0, or NaN when a score is not finite
    for t in range(visible):
        scores[t] *= scale
        checksum += scores[t] * np.float32(0.0)
    largest = scores[0]
    for t in range(visible):
        largest = max(largest, scores[t])
    total = np.float32(0.0)
    for t in range(visible):
        e = exp(scores[t] - largest)
        scores[t] = e
        total += e
    inverse = np.float32(1.0) / total + checksum
    for t in range(visible):
        weights[t] = narrow(scores[t] * inverse, weights)
    for t in range(visible, weights.shape[0]):
        weights[t] = 0


@njit(**EXACT)
def _attend_piece(out: Any, q: Any, keys: Any, values: Any, context: int, first: int, group: int, scale: Any) -> None:
    """out[i, h] = softmax(scale · q[i, h] · Kᵀ) · V for the heads h in [first, first + group) of consecutive tokens i,
    token 0 seeing `context` keys."""
    num_tokens, v_dim = q.shape[0], values.shape[1]
    padded = keys.shape[0]
    num_rows = num_tokens * group
    weights = np.empty((num_rows, padded), np.uint16)
    scores = np.empty(padded, np.float32)
    for i in range(num_tokens):
        for h in range(group):
            _weigh(weights[i * group + h], q[i, first + h], keys, context + i, scores, scale)
    mixed = np.zeros((num_rows, v_dim), np.uint16)
    for begin in range(0, num_rows, MAX_ROWS):
        for column in range(0, v_dim, WIDTH):
            add_product(
                min(MAX_ROWS, num_rows - begin), weights[begin:].ctypes.data, 2 * padded,
                values.ctypes.data + 2 * column, 2 * v_dim, padded // 2,
                mixed[begin:].ctypes.data + 2 * column, 2 * v_dim,
            )  # fmt: skip
    for i in range(num_tokens):
        for h in range(group):
            out[i, first + h] = mixed[i * group + h]


@chunk_kernel(**EXACT)
def attend_pieces(arguments, chunk):  # type: ignore[no-untyped-def]
    """Piece chunk // num_kv_heads for KV head chunk % num_kv_heads; chunks are pieces times KV heads."""
    fields = carray(pointer(arguments), NUM_FIELDS, np.int64)
    step = carray(pointer(fields[STEP]), NUM_STEP_FIELDS, np.int64)
    heads, kv_heads, dim, v_dim = fields[NUM_HEADS], fields[NUM_KV_HEADS], fields[HEAD_DIM], fields[V_HEAD_DIM]
    number, kv_head = chunk // kv_heads, chunk % kv_heads
    piece = carray(pointer(step[PIECES]), (number + 1, PIECE_FIELDS), np.int64)[number]
    row, begin, count, context = piece[0], piece[1], piece[2], piece[3]
    num_tokens, num_slots = fields[NUM_TOKENS], fields[NUM_SLOTS]
    q = carray(pointer(fields[Q]), (num_tokens, heads, dim), np.uint16)
    out = carray(pointer(fields[OUT]), (num_tokens, heads, v_dim), np.uint16)
    k_cache = carray(pointer(fields[K_CACHE]), (num_slots, kv_heads, dim), np.uint16)
    v_cache = carray(pointer(fields[V_CACHE]), (num_slots, kv_heads, v_dim), np.uint16)
    block_table = carray(pointer(step[BLOCK_TABLES]), (row + 1, step[MAX_BLOCKS]), np.int32)[row]
    length = context + count - 1
    padded = -(-length // ROWS_AT_ONCE) * ROWS_AT_ONCE
    keys = _gather(k_cache, block_table, fields[BLOCK_SIZE], kv_head, length, padded)
    values = _gather(v_cache, block_table, fields[BLOCK_SIZE], kv_head, length, padded)
    group = heads // kv_heads
    scale = carray(pointer(arguments + 8 * NUMBERS), 2, np.float32)[SCALE]
    _attend_piece(
        out[begin : begin + count], q[begin : begin + count], keys, values, context, kv_head * group, group, scale
    )
