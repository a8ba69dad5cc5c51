"""Paged attention written for the eye: the oracle of the fast backends, and the backend of devices that have none.

Row by row, in float32, on any device and dtype. Knows nothing of blocks beyond reading a row's table.
"""

import torch
from torch import Tensor

from server.engine.attention.interface import AttentionMetadata, KVLayer


def attend(
    q: Tensor,  # [num_tokens, num_heads, head_dim]
    k: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    v: Tensor,  # [num_tokens, num_kv_heads, v_head_dim]
    layer: KVLayer,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:  # [num_tokens, num_heads, v_head_dim], q's dtype
    """out[t] = softmax(scale · q[t] · Kᵀ, over what t may see) · V, with K and V the blocks of t's row."""
    write_kv(k, v, layer, metadata)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    for row, context_len in enumerate(metadata.context_lens.tolist()):
        begin, end = metadata.query_starts[row : row + 2].tolist()
        keys, values = gather_kv(layer, metadata, row, context_len)
        visible = visible_mask(end - begin, context_len, sliding_window).to(q.device)
        out[begin:end] = attend_dense(q[begin:end], keys, values, visible, scale=scale, softcap=softcap, sinks=sinks)
    return out


def write_kv(k: Tensor, v: Tensor, layer: KVLayer, metadata: AttentionMetadata) -> None:
    """cache[slot_mapping[t]] = k[t], v[t]."""
    slots = torch.from_numpy(metadata.slot_mapping).to(k.device)
    layer.k_cache.view(-1, *k.shape[1:])[slots] = k
    layer.v_cache.view(-1, *v.shape[1:])[slots] = v


def gather_kv(layer: KVLayer, metadata: AttentionMetadata, row: int, context_len: int) -> tuple[Tensor, Tensor]:
    """K [context_len, num_kv_heads, head_dim] and V [context_len, num_kv_heads, v_head_dim] of one row, in order."""
    num_blocks = -(-context_len // layer.k_cache.shape[1])
    blocks = torch.from_numpy(metadata.block_tables[row, :num_blocks]).to(layer.k_cache.device)
    return layer.k_cache[blocks].flatten(0, 1)[:context_len], layer.v_cache[blocks].flatten(0, 1)[:context_len]


def visible_mask(num_queries: int, context_len: int, sliding_window: int | None) -> Tensor:
    """bool [num_queries, context_len]: query i stands at p = context_len - num_queries + i and sees (p - window, p]."""
    query_at = torch.arange(context_len - num_queries, context_len)[:, None]
    key_at = torch.arange(context_len)[None]
    visible = key_at <= query_at
    return visible if sliding_window is None else visible & (key_at > query_at - sliding_window)


def attend_dense(
    q: Tensor,  # [num_queries, num_heads, head_dim]
    keys: Tensor,  # [context_len, num_kv_heads, head_dim]
    values: Tensor,  # [context_len, num_kv_heads, v_head_dim]
    visible: Tensor,  # bool [num_queries, context_len]
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,  # [num_heads]
) -> Tensor:  # [num_queries, num_heads, v_head_dim], q's dtype
    """softmax(softcap · tanh(scale · q · Kᵀ / softcap)) · V in float32; head h reads KV head h // group.

    With sinks the softmax is over the scores and sinks[h], whose weight multiplies no value.
    """
    group = q.shape[1] // keys.shape[1]
    queries = q.float().unflatten(1, (-1, group))  # [num_queries, num_kv_heads, group, head_dim]
    scores = torch.einsum("qhgd,khd->hgqk", queries, keys.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        extra = sinks.float().view(-1, group, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], -1)
    weights = scores.softmax(-1)[..., : len(keys)]
    return torch.einsum("hgqk,khd->qhgd", weights, values.float()).flatten(1, 2).to(q.dtype)
