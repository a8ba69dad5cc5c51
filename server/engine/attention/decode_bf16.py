"""Scores and mix of one decode row in bfloat16, over the inner loops of decode_dots.py. Knows no softmax, no blocks."""

# mypy: disallow-untyped-decorators=False
# numba's decorators are untyped and would make every kernel an error.

from typing import Any

import numpy as np
from numba import njit

from adapters.ops.bf16 import narrow
from adapters.ops.bf16_dot import LANES
from server.engine.attention.decode_dots import AHEAD, COLUMNS, HEAD_DIMS, KEYS, MAX_HEADS, mix_values, score_keys
from server.engine.fast_exp import EXACT

_SPAN = 32
"""Tokens that are read for all KV heads before the next are, since a token's heads lie together."""


def suits(head_dim: int, v_head_dim: int) -> bool:
    """Whether the inner loops are written for heads of these sizes."""
    return (head_dim == HEAD_DIMS[0] or head_dim == HEAD_DIMS[1]) and v_head_dim % COLUMNS == 0


@njit(**EXACT)
def padded_slots(slots: Any) -> Any:
    """`slots` and then the last of them again, as far as the inner loops read."""
    length = slots.shape[0]
    padded = np.empty(-(-length // KEYS) * KEYS + AHEAD, np.int64)
    padded[:length] = slots
    padded[length:] = slots[length - 1]
    return padded


@njit(**EXACT)
def score_by_dots(q: Any, k_cache: Any, slots: Any, first: int, group: int, scale: Any) -> Any:
    """[num_heads, length] scores[h, i] = scale · q[h] · K[slots[i]], K of KV head first + h // group; `slots` padded,
    and scores too."""
    num_heads, dim = q.shape
    stride = 2 * k_cache.shape[1] * dim
    scores = np.empty((num_heads, slots.shape[0] - AHEAD), np.float32)
    for begin in range(0, scores.shape[1], _SPAN):
        count = min(_SPAN, scores.shape[1] - begin)
        for h in range(0, num_heads, group):
            keys = k_cache.ctypes.data + 2 * dim * (first + h // group)
            for part in range(h, h + group, MAX_HEADS):
                score_keys(
                    k_cache, min(MAX_HEADS, h + group - part), dim, q[part:].ctypes.data, keys,
                    slots[begin:].ctypes.data, stride, count, scale,
                    scores[part:, begin:].ctypes.data, 4 * scores.shape[1],
                )  # fmt: skip
    return scores


@njit(**EXACT)
def mix_by_dots(out: Any, weights: Any, v_cache: Any, slots: Any, length: int, first: int, group: int) -> None:
    """out[h] = Σ_i weights[h, i] · V[slots[i]] over i < length, V of KV head first + h // group; `slots` padded."""
    num_heads, dim = out.shape
    stride = 2 * v_cache.shape[1] * dim
    totals = np.zeros((num_heads, dim), np.float32)
    for begin in range(0, length, _SPAN):
        count = min(_SPAN, length - begin)
        for h in range(0, num_heads, group):
            values = v_cache.ctypes.data + 2 * dim * (first + h // group)
            for part in range(h, h + group, MAX_HEADS):
                for column in range(0, dim, COLUMNS):
                    mix_values(
                        v_cache, min(MAX_HEADS, h + group - part),
                        weights[part:, begin:].ctypes.data, 4 * weights.shape[1], values + 2 * column,
                        slots[begin:].ctypes.data, stride, count, totals[part:, column:].ctypes.data, 4 * dim,
                    )  # fmt: skip
    for h in range(num_heads):
        for column in range(0, dim, LANES):
            for i in range(LANES // 2):  # even columns lie first, then the odd ones
                out[h, column + 2 * i] = narrow(totals[h, column + i], out)
                out[h, column + 2 * i + 1] = narrow(totals[h, column + LANES // 2 + i], out)
