"""The Triton kernels of the LoRA operation for tiles of neighbouring rows of one adapter (prefill): shrink and expand.

A tile is up to BLOCK_M consecutive tokens with one adapter and one weight; its products run on the matrix units and
accumulate in float32. As with rows there are no atomics and nothing to zero, ranks are read from the device, a tile of
length 0 ends at once, and an adapter beyond MAX_RANK yields NaN.
"""

import triton
import triton.language as tl

from adapters.ops.gpu_kernels import INTERPRETED, narrow

_STEP_FIELDS = ["tile_begins", "tile_lengths", "tile_starts", "tile_weights"]


@triton.jit
def _dot(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a · b, summed in float32; products of bf16 are exact, those of float32 keep about 22 bits."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _shrink_tile(  # type: ignore[no-untyped-def]
    out,  # float32 [BLOCK_M, MAX_RANK]
    x_tile,  # [length, IN], rows x_stride apart
    a_rows,  # [rank, IN]
    length,
    rank,
    span,
    x_stride,
    IN: tl.constexpr,
    MAX_RANK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = x · Aᵀ over one span of in_features, BLOCK_R ranks at a time."""
    i = tl.arange(0, BLOCK_M)
    x_rows = x_tile + i.to(tl.int64)[:, None] * x_stride
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        total = tl.full([BLOCK_M, BLOCK_R], 0.0, tl.float32)
        for step in range(STEPS):
            k = (span * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
            x_k = tl.load(x_rows + k[None, :], mask=(i < length)[:, None] & (k < IN)[None, :], other=0.0)
            inside = (k < IN)[:, None] & (r < rank)[None, :]
            a_k = tl.load(a_rows + r[None, :] * IN + k[:, None], mask=inside, other=0.0)
            total = _dot(x_k, a_k, total)
        tl.store(out + i[:, None] * MAX_RANK + r[None, :], total, mask=(i < length)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize_on_alignment=_STEP_FIELDS)
def shrink_tiles(  # type: ignore[no-untyped-def]
    partials,  # float32 [num_tiles, NUM_MODULES, SPLITS, BLOCK_M, MAX_RANK]
    x,  # [num_tokens, IN], rows x_stride apart
    a_pool,  # [NUM_MODULES, num_pool_rows, IN]
    ranks,  # int32 [NUM_MODULES, num_pool_rows]
    tile_begins,  # int32 [num_tiles] first token
    tile_lengths,  # int32 [num_tiles]
    tile_starts,  # int32 [num_tiles] first pool row
    x_stride,
    num_pool_rows,
    IN: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partials[tile, m, s] = x · A_mᵀ over the s-th span of in_features, for the tokens of the tile."""
    tile, span, module = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(tile_lengths + tile)
    if length == 0:
        return
    x_tile = x + tl.load(tile_begins + tile).to(tl.int64) * x_stride
    first = module.to(tl.int64) * num_pool_rows + tl.load(tile_starts + tile)
    rank = tl.minimum(tl.load(ranks + first), MAX_RANK)
    out = partials + ((tile.to(tl.int64) * NUM_MODULES + module) * SPLITS + span) * BLOCK_M * MAX_RANK
    a_rows = a_pool + first * IN
    if rank <= BLOCK_R:
        _shrink_tile(out, x_tile, a_rows, length, rank, span, x_stride, IN, MAX_RANK, STEPS, BLOCK_M, BLOCK_K, BLOCK_R)
    else:
        _shrink_tile(out, x_tile, a_rows, length, rank, span, x_stride, IN, MAX_RANK, STEPS, BLOCK_M, BLOCK_K, 64)


@triton.jit
def _tile_delta(  # type: ignore[no-untyped-def]
    partials,  # float32 [SPLITS, BLOCK_M, MAX_RANK]
    b_rows,  # [rank, OUT]
    length,
    rank,
    n,
    OUT: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """(Σ_s partials[s]) · B, [BLOCK_M, BLOCK_N] in float32.

    bf16: the shrunk rows go in as the sum of two bf16 numbers, which keeps 16 of their bits at twice a small cost.
    """
    i = tl.arange(0, BLOCK_M)
    delta = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        written = (i < length)[:, None] & (r < rank)[None, :]
        shrunk = tl.full([BLOCK_M, BLOCK_R], 0.0, tl.float32)
        for s in tl.static_range(SPLITS):
            at = partials + (s * BLOCK_M + i)[:, None] * MAX_RANK + r[None, :]
            shrunk += tl.load(at, mask=written, other=0.0)
        inside = (r < rank)[:, None] & (n < OUT)[None, :]
        b_n = tl.load(b_rows + r[:, None] * OUT + n[None, :], mask=inside, other=0.0)
        high = narrow(shrunk, b_n.dtype)
        delta = _dot(high, b_n, delta)
        if b_n.dtype != tl.float32:
            delta = _dot(narrow(shrunk - high.to(tl.float32), b_n.dtype), b_n, delta)
    return delta


@triton.jit(do_not_specialize=["module"], do_not_specialize_on_alignment=_STEP_FIELDS)
def expand_tiles(  # type: ignore[no-untyped-def]
    y,  # [num_tokens, OUT]
    b_pool,  # [num_pool_rows, OUT]
    partials,  # float32 [num_tiles, NUM_MODULES, SPLITS, BLOCK_M, MAX_RANK]
    ranks,  # int32 [NUM_MODULES, num_pool_rows]
    tile_begins,  # int32 [num_tiles] first token
    tile_lengths,  # int32 [num_tiles]
    tile_starts,  # int32 [num_tiles] first pool row
    tile_weights,  # float32 [num_tiles]
    num_pool_rows,
    module,
    OUT: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The second half of `shrink_tiles`, for one module: y += weight · (Σ_s partials[tile, m, s]) · B."""
    tile, block = tl.program_id(0), tl.program_id(1)
    length = tl.load(tile_lengths + tile)
    if length == 0:
        return
    first = tl.load(tile_starts + tile).to(tl.int64)
    rank = tl.load(ranks + module * num_pool_rows + first)
    if rank == 0:
        return
    kept = tl.minimum(rank, MAX_RANK)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = partials + (tile.to(tl.int64) * NUM_MODULES + module) * (SPLITS * BLOCK_M * MAX_RANK)
    delta = _tile_delta(sums, b_pool + first * OUT, length, kept, n, OUT, MAX_RANK, SPLITS, BLOCK_M, BLOCK_N, BLOCK_R)
    delta += tl.where(rank > MAX_RANK, float("nan"), 0.0)
    i = tl.arange(0, BLOCK_M)
    token = tl.load(tile_begins + tile).to(tl.int64) + i
    at = y + token[:, None] * OUT + n[None, :]
    inside = (i < length)[:, None] & (n < OUT)[None, :]
    y_n = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, narrow(y_n + tl.load(tile_weights + tile) * delta, y.dtype.element_ty), mask=inside)
