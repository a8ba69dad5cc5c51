"""The Triton kernels of the LoRA operation for single rows (decode): shrink and expand.

A program takes one row, one span of in_features and one module; partial sums lie apart and the expand adds them in a
fixed order, so there are no atomics, nothing to zero, and a row's bits do not depend on the rows beside it.

A kernel knows pointers and strides. Ranks are read from the device, so a graph captured once serves whatever adapters
stand in the pools. A row without entries ends at once. MAX_RANK is the width of the workspace; an adapter beyond it
yields NaN, never a sum cut short.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""The interpreter holds bf16 as integers: it multiplies their bits and cuts them off instead of rounding."""

_STEP_FIELDS = ["row_tokens", "row_indptr", "entry_starts", "entry_weights"]
# Where a step's arrays happen to lie in the buffer must not compile a kernel anew.


@triton.jit
def narrow(value, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 `value` rounded to nearest even in `dtype`."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit(do_not_specialize_on_alignment=_STEP_FIELDS)
def shrink_rows(  # type: ignore[no-untyped-def]
    partials,  # float32 [num_entries, NUM_MODULES, SPLITS, MAX_RANK]
    x,  # [num_tokens, IN], rows x_stride apart
    a_pool,  # [NUM_MODULES, num_pool_rows, IN]
    ranks,  # int32 [NUM_MODULES, num_pool_rows]
    row_tokens,  # int32 [num_rows]
    row_indptr,  # int32 [num_rows + 1]
    entry_starts,  # int32 [num_entries]
    x_stride,
    num_pool_rows,
    IN: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partials[e, m, s] = x[t] · A_mᵀ over the s-th span of in_features, for the entries e of row t."""
    row, span, module = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(row_indptr + row)
    end = tl.load(row_indptr + row + 1)
    if begin == end:
        return
    x_row = x + tl.load(row_tokens + row).to(tl.int64) * x_stride
    for e in range(begin, end):
        first = module.to(tl.int64) * num_pool_rows + tl.load(entry_starts + e)
        rank = tl.minimum(tl.load(ranks + first), MAX_RANK)
        out = partials + ((tl.cast(e, tl.int64) * NUM_MODULES + module) * SPLITS + span) * MAX_RANK
        for r0 in range(0, rank, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            total = tl.full([BLOCK_R], 0.0, tl.float32)
            for step in tl.static_range(STEPS):
                k = (span * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
                x_k = tl.load(x_row + k, mask=k < IN, other=0.0).to(tl.float32)
                inside = (r < rank)[:, None] & (k < IN)[None, :]
                a_k = tl.load(a_pool + (first + r)[:, None] * IN + k[None, :], mask=inside, other=0.0)
                total += tl.sum(a_k.to(tl.float32) * x_k[None, :], 1)
            tl.store(out + r, total, mask=r < rank)


@triton.jit
def _expand_row(  # type: ignore[no-untyped-def]
    y_row,  # [OUT]
    b_pool,  # [num_pool_rows, OUT]
    partials,
    ranks,  # int32 [num_pool_rows] of this module
    entry_starts,
    entry_weights,
    begin,
    end,
    block,
    module: tl.constexpr,
    OUT: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y[n] += Σ_e weight_e · (Σ_s partials[e, m, s]) · B over one block of outputs, unless no entry has a rank here."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    span = tl.arange(0, SPLITS_PADDED)
    y_n = tl.load(y_row + n, mask=n < OUT, other=0.0).to(tl.float32)
    delta = tl.full([BLOCK_N], 0.0, tl.float32)
    total_rank = 0
    for e in range(begin, end):
        first = tl.load(entry_starts + e).to(tl.int64)
        weight = tl.load(entry_weights + e)
        rank = tl.load(ranks + first)
        total_rank += rank
        delta += tl.where(rank > MAX_RANK, float("nan"), 0.0)
        kept = tl.minimum(rank, MAX_RANK)
        spans = partials + ((tl.cast(e, tl.int64) * NUM_MODULES + module) * SPLITS + span) * MAX_RANK
        for r0 in range(0, kept, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            written = (span < SPLITS)[:, None] & (r < kept)[None, :]
            shrunk = tl.sum(tl.load(spans[:, None] + r[None, :], mask=written, other=0.0), 0)
            inside = (r < kept)[:, None] & (n < OUT)[None, :]
            b_n = tl.load(b_pool + (first + r)[:, None] * OUT + n[None, :], mask=inside, other=0.0)
            delta += weight * tl.sum(shrunk[:, None] * b_n.to(tl.float32), 0)
    if total_rank > 0:
        tl.store(y_row + n, narrow(y_n + delta, y_row.dtype.element_ty), mask=n < OUT)


@triton.jit(do_not_specialize_on_alignment=_STEP_FIELDS)
def expand_rows(  # type: ignore[no-untyped-def]
    ys,  # per module [num_tokens, OUTS[m]]
    b_pools,  # per module [num_pool_rows, OUTS[m]]
    partials,  # float32 [num_entries, NUM_MODULES, SPLITS, MAX_RANK]
    ranks,  # int32 [NUM_MODULES, num_pool_rows]
    row_tokens,  # int32 [num_rows]
    row_indptr,  # int32 [num_rows + 1]
    entry_starts,  # int32 [num_entries]
    entry_weights,  # float32 [num_entries]
    num_pool_rows,
    OUTS: tl.constexpr,
    FIRST_BLOCKS: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The second half of `shrink_rows`: blocks [FIRST_BLOCKS[m], FIRST_BLOCKS[m + 1]) are module m's outputs."""
    row, block = tl.program_id(0), tl.program_id(1)
    begin = tl.load(row_indptr + row)
    end = tl.load(row_indptr + row + 1)
    if begin == end:
        return
    token = tl.load(row_tokens + row).to(tl.int64)
    for m in tl.static_range(NUM_MODULES):
        if block >= FIRST_BLOCKS[m] and block < FIRST_BLOCKS[m + 1]:
            _expand_row(
                ys[m] + token * OUTS[m],
                b_pools[m],
                partials,
                ranks + m * num_pool_rows,
                entry_starts,
                entry_weights,
                begin,
                end,
                block - FIRST_BLOCKS[m],
                m,
                OUTS[m],
                NUM_MODULES,
                MAX_RANK,
                SPLITS,
                SPLITS_PADDED,
                BLOCK_N,
                BLOCK_R,
            )
