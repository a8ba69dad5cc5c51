"""The numba kernel of CPU attention: write new K and V to the cache, attend one new token per row over its blocks.

Arrays hold bf16 as uint16 bits or float32 as it is (adapters/ops/bf16.py); sums are float32. Both kernels run in chunks
on a ThreadTeam and read one array of int64 fields. Knows nothing of torch, requests or prompts.
"""

from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from adapters.ops.bf16 import narrow, pointer, widen
from adapters.ops.chunk_kernel import chunk_kernel
from server.engine.attention.decode_bf16 import mix_by_dots, padded_slots, score_by_dots
from server.engine.fast_exp import EXACT, exp

(
    OUT,  # address of [num_tokens, num_heads, v_head_dim]; it, q, k and v have the caches' dtype and are contiguous
    Q,  # [num_tokens, num_heads, head_dim]
    K,  # [num_tokens, num_kv_heads, head_dim]
    V,  # [num_tokens, num_kv_heads, v_head_dim]
    K_CACHE,  # [num_slots, num_kv_heads, head_dim]
    V_CACHE,  # [num_slots, num_kv_heads, v_head_dim]
    SINKS,  # float32 [num_heads], -inf = none
    STEP,  # int64 [NUM_STEP_FIELDS], what differs from step to step
    NUM_TOKENS,
    NUM_SLOTS,
    NUM_HEADS,
    NUM_KV_HEADS,
    HEAD_DIM,
    V_HEAD_DIM,
    NUM_DECODE_ROWS,
    BLOCK_SIZE,
    SPLITS,  # chunks per decode row; each takes its share of the KV heads
    WINDOW,  # NO_WINDOW = none
    NUMBERS,  # float32 [2]: SCALE, SOFTCAP, in the place of one field
    NUM_FIELDS,
) = range(20)
(
    SLOT_MAPPING,  # address of int64 [num_tokens]
    BLOCK_TABLES,  # int32 [num_rows, max_blocks]
    CONTEXT_LENS,  # int32 [num_rows]
    PIECES,  # int64 [num_pieces, 4], of prefill_kernels.py
    MAX_BLOCKS,
    NUM_STEP_FIELDS,
) = range(6)
SCALE, SOFTCAP = 0, 1  # softcap 0 = none
NO_WINDOW = 2**62
WRITE_CHUNK = 64  # tokens


@njit(inline="always", **EXACT)
def _cap(x: Any, softcap: Any) -> Any:
    """softcap · tanh(x / softcap), with tanh|z| = (1 - e^(-2|z|)) / (1 + e^(-2|z|))."""
    z = x / softcap
    e = exp(np.float32(-2.0) * abs(z))
    tanh = (np.float32(1.0) - e) / (np.float32(1.0) + e)
    return softcap * tanh if z >= 0 else -softcap * tanh


@njit(**EXACT)
def _softmax(scores: Any, softcap: Any, sink: Any) -> None:
    """scores [length] = e^(scores - max) / Σ e^(scores - max), in place; all NaN when any of them is not finite.

    A sink is one score more in max and Σ, uncapped; -inf = none.
    """
    checksum = np.float32(0.0)  # 0, or NaN when a score is not finite
    for i in range(scores.shape[0]):
        checksum += scores[i] * np.float32(0.0)
    if softcap > 0:
        for i in range(scores.shape[0]):
            scores[i] = _cap(scores[i], softcap)
    largest = scores[0]
    for i in range(scores.shape[0]):
        largest = max(largest, scores[i])
    total = np.float32(0.0)
    if sink > -np.inf:
        largest = max(largest, sink)
        total += exp(sink - largest)
    for i in range(scores.shape[0]):
        e = exp(scores[i] - largest)
        scores[i] = e
        total += e
    inverse = np.float32(1.0) / total + checksum
    for i in range(scores.shape[0]):
        scores[i] *= inverse


@njit(**EXACT)
def _slots_of(block_table: Any, begin: int, end: int, block_size: int) -> Any:
    """[end - begin] slots of the row's tokens [begin, end)."""
    slots = np.empty(end - begin, np.int64)
    for i in range(end - begin):
        at = begin + i
        slots[i] = np.int64(block_table[at // block_size]) * block_size + at % block_size
    return slots


@njit(**EXACT)
def _score(q: Any, k_cache: Any, slots: Any, first: int, group: int, scale: Any) -> Any:
    """[num_heads, length] scores[h, i] = scale · q[h] · K[slots[i]], K of KV head first + h // group."""
    num_heads, head_dim = q.shape
    scaled = np.empty((num_heads, head_dim), np.float32)
    for h in range(num_heads):
        for d in range(head_dim):
            scaled[h, d] = widen(q[h, d]) * scale
    scores = np.empty((num_heads, slots.shape[0]), np.float32)
    key = np.empty(head_dim, np.float32)
    for i in range(slots.shape[0]):
        slot = slots[i]  # read here: inside the loops it might alias `key`, and they would not vectorise
        for kv in range(num_heads // group):
            for d in range(head_dim):
                key[d] = widen(k_cache[slot, first + kv, d])
            for h in range(kv * group, (kv + 1) * group):
                dot = np.float32(0.0)
                for d in range(head_dim):
                    dot += scaled[h, d] * key[d]
                scores[h, i] = dot
    return scores


@njit(**EXACT)
def _mix(out: Any, weights: Any, v_cache: Any, slots: Any, first: int, group: int) -> None:
    """out[h] = Σ_i weights[h, i] · V[slots[i]], V of KV head first + h // group. out [num_heads, v_head_dim]."""
    num_heads, v_head_dim = out.shape
    length = slots.shape[0]
    total = np.zeros((num_heads, v_head_dim), np.float32)
    unrolled = length - length % 4  # four tokens at a time: a quarter of the loads and stores of `total`
    for i in range(0, unrolled, 4):
        a, b, c, d = slots[i], slots[i + 1], slots[i + 2], slots[i + 3]
        for h in range(num_heads):
            kv = first + h // group
            wa, wb, wc, wd = weights[h, i], weights[h, i + 1], weights[h, i + 2], weights[h, i + 3]
            for j in range(v_head_dim):
                near = wa * widen(v_cache[a, kv, j]) + wb * widen(v_cache[b, kv, j])
                far = wc * widen(v_cache[c, kv, j]) + wd * widen(v_cache[d, kv, j])
                total[h, j] += near + far
    for i in range(unrolled, length):
        a = slots[i]
        for h in range(num_heads):
            kv, wa = first + h // group, weights[h, i]
            for j in range(v_head_dim):
                total[h, j] += wa * widen(v_cache[a, kv, j])
    for h in range(num_heads):
        for j in range(v_head_dim):
            out[h, j] = narrow(total[h, j], out)


@njit(**EXACT)
def _attend(
    out: Any,  # [num_heads, v_head_dim], the heads that read KV heads [first, first + num_heads // group)
    q: Any,  # [num_heads, head_dim]
    k_cache: Any,  # [num_slots, num_kv_heads, head_dim]
    v_cache: Any,  # [num_slots, num_kv_heads, v_head_dim]
    block_table: Any,  # [max_blocks]
    block_size: int,
    context_len: Any,
    first: int,
    group: int,
    scale: Any,
    window: Any,
    softcap: Any,
    sinks: Any,  # [all heads]
) -> None:
    """out[h] = softmax(scale · q[h] · Kᵀ) · V over the tokens of one row that its last token sees."""
    end = np.int64(context_len)
    begin = max(np.int64(0), end - window)
    slots = _slots_of(block_table, begin, end, block_size)
    weights = _score(q, k_cache, slots, first, group, scale)
    for h in range(weights.shape[0]):
        _softmax(weights[h], softcap, sinks[first * group + h])
    _mix(out, weights, v_cache, slots, first, group)


@njit(**EXACT)
def _attend_by_dots(  # type: ignore[no-untyped-def]
    out, q, k_cache, v_cache, block_table, block_size, context_len, first, group, scale, window, softcap, sinks
):
    """The same for bfloat16 by the processor's dot product; only where it `is_supported` and decode_bf16 `suits`."""
    end = np.int64(context_len)
    begin = max(np.int64(0), end - window)
    slots = padded_slots(_slots_of(block_table, begin, end, block_size))
    scores = score_by_dots(q, k_cache, slots, first, group, scale)
    for h in range(scores.shape[0]):
        _softmax(scores[h, : end - begin], softcap, sinks[first * group + h])
    mix_by_dots(out, scores, v_cache, slots, end - begin, first, group)


@njit(**EXACT)
def _write(arguments: int, chunk: int, kind: Any) -> None:
    """cache[slot_mapping[t]] = k[t], v[t] for the tokens t of a chunk."""
    fields = carray(pointer(arguments), NUM_FIELDS, np.int64)
    step = carray(pointer(fields[STEP]), NUM_STEP_FIELDS, np.int64)
    num_tokens, heads, dim, v_dim = fields[NUM_TOKENS], fields[NUM_KV_HEADS], fields[HEAD_DIM], fields[V_HEAD_DIM]
    k = carray(pointer(fields[K]), (num_tokens, heads * dim), kind)
    v = carray(pointer(fields[V]), (num_tokens, heads * v_dim), kind)
    k_cache = carray(pointer(fields[K_CACHE]), (fields[NUM_SLOTS], heads * dim), kind)
    v_cache = carray(pointer(fields[V_CACHE]), (fields[NUM_SLOTS], heads * v_dim), kind)
    slot_mapping = carray(pointer(step[SLOT_MAPPING]), num_tokens, np.int64)
    for t in range(chunk * WRITE_CHUNK, min(num_tokens, (chunk + 1) * WRITE_CHUNK)):
        slot = slot_mapping[t]
        for d in range(heads * dim):
            k_cache[slot, d] = k[t, d]
        for d in range(heads * v_dim):
            v_cache[slot, d] = v[t, d]


@njit(**EXACT)
def _heads(arguments: int, chunk: int, kind: Any) -> Any:
    """The arguments of `_attend` for one row's last token and the heads of one of its splits."""
    fields = carray(pointer(arguments), NUM_FIELDS, np.int64)
    step = carray(pointer(fields[STEP]), NUM_STEP_FIELDS, np.int64)
    heads, kv_heads, dim, v_dim = fields[NUM_HEADS], fields[NUM_KV_HEADS], fields[HEAD_DIM], fields[V_HEAD_DIM]
    num_rows, max_blocks = fields[NUM_DECODE_ROWS], step[MAX_BLOCKS]
    q = carray(pointer(fields[Q]), (num_rows, heads, dim), kind)
    out = carray(pointer(fields[OUT]), (num_rows, heads, v_dim), kind)
    k_cache = carray(pointer(fields[K_CACHE]), (fields[NUM_SLOTS], kv_heads, dim), kind)
    v_cache = carray(pointer(fields[V_CACHE]), (fields[NUM_SLOTS], kv_heads, v_dim), kind)
    block_tables = carray(pointer(step[BLOCK_TABLES]), (num_rows, max_blocks), np.int32)
    context_lens = carray(pointer(step[CONTEXT_LENS]), num_rows, np.int32)
    numbers = carray(pointer(arguments + 8 * NUMBERS), 2, np.float32)
    sinks = carray(pointer(fields[SINKS]), heads, np.float32)
    splits = fields[SPLITS]
    group, per_chunk = heads // kv_heads, kv_heads // splits
    row, first = chunk // splits, (chunk % splits) * per_chunk
    begin, end = first * group, (first + per_chunk) * group
    return (
        out[row, begin:end], q[row, begin:end], k_cache, v_cache, block_tables[row], fields[BLOCK_SIZE],
        context_lens[row], first, group, numbers[SCALE], fields[WINDOW], numbers[SOFTCAP], sinks,
    )  # fmt: skip


@chunk_kernel(**EXACT)
def write_bf16(arguments, chunk):  # type: ignore[no-untyped-def]
    _write(arguments, chunk, np.uint16)


@chunk_kernel(**EXACT)
def write_f32(arguments, chunk):  # type: ignore[no-untyped-def]
    _write(arguments, chunk, np.float32)


@chunk_kernel(**EXACT)
def attend_bf16(arguments, chunk):  # type: ignore[no-untyped-def]
    _attend(*_heads(arguments, chunk, np.uint16))


@chunk_kernel(**EXACT)
def attend_f32(arguments, chunk):  # type: ignore[no-untyped-def]
    _attend(*_heads(arguments, chunk, np.float32))


@chunk_kernel(**EXACT)
def attend_by_dots(arguments, chunk):  # type: ignore[no-untyped-def]
    _attend_by_dots(*_heads(arguments, chunk, np.uint16))
