"""The Triton kernels of paged attention: with split contexts for rows with one new token, with tiles for the others.

All of them attend by one loop over keys, `_attend`: the query heads that read one KV head are stacked, so that its K
and V are loaded once for the group, and the softmax is kept as (peak, total, acc) in float32, base 2. Neither atomics
nor the step's company enter a row's arithmetic. Kernels know pointers, strides and the fields of GPUAttentionBatch; a
row without context and a tile without queries end at once, and no slot is read beyond a context.
"""

import triton
import triton.language as tl

from adapters.ops.gpu_kernels import INTERPRETED, narrow

_LOG2_E = tl.constexpr(1.4426950408889634)

# Values of a step, and what a buffer's size decides, must not compile a kernel anew.
_VARYING = ["table_stride", "num_splits"]
_FIELDS = ["slot_mapping", "decode_lens", "block_tables", "tile_rows", "tile_tokens", "tile_positions", "tile_lens"]


@triton.jit
def _product(a, b):  # type: ignore[no-untyped-def]
    """a · b in float32, never TF32. The interpreter would multiply the bits of bf16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,  # [BLOCK_M, BLOCK_D], 0 beyond HEAD_DIM
    query_at,  # int32 [BLOCK_M] position in the row; -1 sees nothing
    begin,
    end,
    block_table,  # int32 [max_blocks] of the row
    k_cache,  # at the KV head: [num_slots], KV_HEADS · HEAD_DIM apart
    v_cache,
    scale,
    softcap,
    window,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """peak = max score, total = Σ 2^(score - peak), acc = Σ 2^(score - peak) · V, over the keys [begin, end) that each
    query sees. score = log2(e) · scale · q · K."""
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(begin, end, BLOCK_N):
        key_at = start + n
        inside = key_at < end
        block = tl.load(block_table + key_at // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + key_at % BLOCK_SIZE
        k_at = k_cache + slot[None, :] * (KV_HEADS * HEAD_DIM) + d[:, None]  # [BLOCK_D, BLOCK_N]
        keys = tl.load(k_at, mask=inside[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        scores = _product(q, keys) * scale
        if HAS_SOFTCAP:
            # tanh z = 1 - 2 / (e^2z + 1), right at both ends
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * _LOG2_E / softcap)) + 1.0))
        visible = inside[None, :] & (key_at[None, :] <= query_at[:, None])
        if HAS_WINDOW:
            visible &= key_at[None, :] > query_at[:, None] - window
        scores = tl.where(visible, scores * _LOG2_E, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no key seen yet: -inf - -inf is no number
        weights = tl.exp2(scores - shift[:, None])
        kept = tl.exp2(peak - shift)
        v_at = v_cache + slot[:, None] * (KV_HEADS * V_HEAD_DIM) + dv[None, :]  # [BLOCK_N, BLOCK_DV]
        values = tl.load(v_at, mask=inside[:, None] & (dv < V_HEAD_DIM)[None, :], other=0.0)
        total = total * kept + tl.sum(weights, 1)
        acc = acc * kept[:, None] + _product(narrow(weights, values.dtype), values)
        peak = new_peak
    return peak, total, acc


@triton.jit
def _first_visible(query_at, window, HAS_WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """The earliest key that a query at `query_at` sees."""
    return tl.maximum(query_at - window + 1, 0) if HAS_WINDOW else 0


@triton.jit
def _split_size(num_keys, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys of one split: MIN_SPLIT, or as many sixteens as keep a row within MAX_SPLITS. Of the row alone."""
    return tl.maximum(MIN_SPLIT, (num_keys + MAX_SPLITS * 16 - 1) // (MAX_SPLITS * 16) * 16)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_FIELDS)
def attend_splits(  # type: ignore[no-untyped-def]
    partial_acc,  # float32 [num_decode_rows, NUM_HEADS, num_splits, V_HEAD_DIM]
    partial_peak,  # float32 [num_decode_rows, NUM_HEADS, num_splits]
    partial_total,  # the same
    q,  # [num_tokens, NUM_HEADS, HEAD_DIM]
    k_cache,
    v_cache,
    decode_lens,  # int32 [num_decode_rows], 0 = nothing
    block_tables,  # int32 [num_rows, table_stride]
    q_token_stride,
    q_head_stride,
    table_stride,
    num_splits,
    scale,
    softcap,
    window,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The partial softmax of row t's one new token, which is token t, over one split of its context."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(decode_lens + row)
    first = _first_visible(context_len - 1, window, HAS_WINDOW)
    size = _split_size(context_len - first, MIN_SPLIT, MAX_SPLITS)
    begin = first + split * size
    end = tl.minimum(begin + size, context_len)
    if begin >= end:
        return
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    m, d, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    head, mine = kv_head * GROUP + m, m < GROUP
    q_at = q + row * q_token_stride + head[:, None] * q_head_stride + d[None, :]
    queries = tl.load(q_at, mask=mine[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    peak, total, acc = _attend(
        queries, tl.where(mine, context_len - 1, -1), begin, end, block_tables + row * table_stride,
        k_cache + kv_head * HEAD_DIM, v_cache + kv_head * V_HEAD_DIM, scale, softcap, window,
        KV_HEADS, HEAD_DIM, V_HEAD_DIM, BLOCK_SIZE, HAS_SOFTCAP, HAS_WINDOW, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    at = (row * NUM_HEADS + head) * num_splits + split
    tl.store(partial_peak + at, peak, mask=mine)
    tl.store(partial_total + at, total, mask=mine)
    acc_at = partial_acc + at[:, None] * V_HEAD_DIM + dv[None, :]
    tl.store(acc_at, acc, mask=mine[:, None] & (dv < V_HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_FIELDS)
def combine_splits(  # type: ignore[no-untyped-def]
    out,  # [num_tokens, NUM_HEADS, V_HEAD_DIM]
    partial_acc,
    partial_peak,
    partial_total,
    decode_lens,
    sinks,  # [NUM_HEADS]
    num_splits,
    window,
    NUM_HEADS: tl.constexpr, V_HEAD_DIM: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """out[t, h] = Σ_s 2^(peak_s - top) · acc_s / (Σ_s 2^(peak_s - top) · total_s + 2^(sink - top)), splits in order;
    0 for a row without context."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = (row * NUM_HEADS + head) * num_splits
    s, dv = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DV)
    out_at = out + (row * NUM_HEADS + head) * V_HEAD_DIM + dv
    acc = tl.zeros([BLOCK_DV], tl.float32)
    context_len = tl.load(decode_lens + row)
    if context_len == 0:
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=dv < V_HEAD_DIM)
        return
    first = _first_visible(context_len - 1, window, HAS_WINDOW)
    size = _split_size(context_len - first, MIN_SPLIT, MAX_SPLITS)
    count = (context_len - first + size - 1) // size
    top = tl.max(tl.load(partial_peak + at + s, mask=s < count, other=float("-inf")), 0)
    total = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2_E
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    top = tl.where(top == float("-inf"), 0.0, top)  # of scores that are NaN
    for split in range(count):
        weight = tl.exp2(tl.load(partial_peak + at + split) - top)
        total += weight * tl.load(partial_total + at + split)
        acc += weight * tl.load(partial_acc + (at + split) * V_HEAD_DIM + dv, mask=dv < V_HEAD_DIM, other=0.0)
    tl.store(out_at, narrow(acc / total, out.dtype.element_ty), mask=dv < V_HEAD_DIM)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_FIELDS)
def attend_tiles(  # type: ignore[no-untyped-def]
    out,  # [num_tokens, NUM_HEADS, V_HEAD_DIM]
    q,  # [num_tokens, NUM_HEADS, HEAD_DIM]
    k_cache,
    v_cache,
    sinks,  # [NUM_HEADS]
    tile_rows,  # int32 [num_tiles]
    tile_tokens,  # int32 [num_tiles] first token in the packed batch
    tile_positions,  # int32 [num_tiles] its position in the row
    tile_lens,  # int32 [num_tiles] tokens, 0 = nothing
    block_tables,
    q_token_stride,
    q_head_stride,
    table_stride,
    scale,
    softcap,
    window,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Causal attention of a part of a tile, BLOCK_M // GROUP tokens · GROUP heads, over the row's context before it."""
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile_len, position = tl.load(tile_lens + tile), tl.load(tile_positions + tile)
    if part * QUERIES >= tile_len:
        return
    m, d, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    query, head = part * QUERIES + m // GROUP, kv_head * GROUP + m % GROUP
    mine = (m < QUERIES * GROUP) & (query < tile_len)
    token = (tl.load(tile_tokens + tile) + query).to(tl.int64)
    q_at = q + (token * q_token_stride + head * q_head_stride)[:, None] + d[None, :]
    queries = tl.load(q_at, mask=mine[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    begin = _first_visible(position + part * QUERIES, window, HAS_WINDOW)
    end = position + tl.minimum((part + 1) * QUERIES, tile_len)
    peak, total, acc = _attend(
        queries, tl.where(mine, position + query, -1), begin, end,
        block_tables + tl.load(tile_rows + tile).to(tl.int64) * table_stride,
        k_cache + kv_head * HEAD_DIM, v_cache + kv_head * V_HEAD_DIM, scale, softcap, window,
        KV_HEADS, HEAD_DIM, V_HEAD_DIM, BLOCK_SIZE, HAS_SOFTCAP, HAS_WINDOW, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=mine, other=0.0).to(tl.float32) * _LOG2_E
        top = tl.maximum(peak, sink)
        kept = tl.exp2(peak - top)
        total, acc = total * kept + tl.exp2(sink - top), acc * kept[:, None]
    result = narrow(acc / tl.where(mine, total, 1.0)[:, None], out.dtype.element_ty)
    out_at = out + (token * NUM_HEADS + head)[:, None] * V_HEAD_DIM + dv[None, :]
    tl.store(out_at, result, mask=mine[:, None] & (dv < V_HEAD_DIM)[None, :])
