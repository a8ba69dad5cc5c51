"""The Triton kernel that writes a step's K and V into the paged cache. Knows pointers and strides."""

import triton
import triton.language as tl


@triton.jit
def _copy_heads(  # type: ignore[no-untyped-def]
    target,  # [HEADS, DIM] contiguous
    source,  # [HEADS, DIM], rows head_stride apart
    head_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (d < DIM)
    tl.store(target + head * DIM + d, tl.load(source + head * head_stride + d, mask=inside), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def write_kv(  # type: ignore[no-untyped-def]
    k,  # [num_tokens, KV_HEADS, HEAD_DIM]
    v,  # [num_tokens, KV_HEADS, V_HEAD_DIM]
    k_cache,  # [num_slots, KV_HEADS, HEAD_DIM]
    v_cache,  # [num_slots, KV_HEADS, V_HEAD_DIM]
    slot_mapping,  # int32 [num_tokens], below 0 = padding
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """cache[slot_mapping[t]] = k[t], v[t]. One program a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    k_slot, v_slot = k_cache + slot * KV_HEADS * HEAD_DIM, v_cache + slot * KV_HEADS * V_HEAD_DIM
    _copy_heads(k_slot, k + token * k_token_stride, k_head_stride, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)
    _copy_heads(v_slot, v + token * v_token_stride, v_head_stride, KV_HEADS, V_HEAD_DIM, BLOCK_H, BLOCK_DV)
