"""The GPU's staged batches computed in plain torch on the CPU: reads the words at every call, as a kernel would.

Stands in for the Triton kernels where a test is about staging and graphs, since their interpreter is slow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from adapters.ops import AffineTable
from adapters.ops.affine_interface import rows_a_token
from adapters.ops.gpu_affine_batch import GPUAffineBatch
from adapters.ops.gpu_batch import GPULoRABatch
from adapters.ops.interface import LoRAPools, check_tokens
from adapters.ops.reference import row_writer
from server.engine.attention import reference
from server.engine.attention.gpu_batch import GPUAttentionBatch
from server.engine.attention.interface import AttentionMetadata, KVLayer
from server.engine.attention.reference import attend_dense, visible_mask


def attend(
    q: Tensor,  # [num_tokens, num_heads, head_dim]
    k: Tensor,
    v: Tensor,
    layer: KVLayer,
    metadata: AttentionMetadata | GPUAttentionBatch,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    assert sinks is None
    options = {"scale": scale, "softcap": softcap}
    if isinstance(metadata, AttentionMetadata):
        return reference.attend(q, k, v, layer, metadata, sliding_window=sliding_window, **options)
    assert len(q) == metadata.caps.num_tokens
    k_cache, v_cache = (cache.view(-1, *cache.shape[2:]) for cache in (layer.k_cache, layer.v_cache))
    is_token = metadata.slot_mapping >= 0
    k_cache[metadata.slot_mapping[is_token]], v_cache[metadata.slot_mapping[is_token]] = k[is_token], v[is_token]
    out = torch.full((*q.shape[:2], v.shape[2]), 1e4, dtype=q.dtype)  # padding is garbage, as on the device
    for row, begin, num_queries, length in _chunks(metadata):
        blocks = metadata.block_tables[row]
        keys, values = (c[blocks].flatten(0, 1)[:length] for c in (layer.k_cache, layer.v_cache))
        visible = visible_mask(num_queries, length, sliding_window)
        chunk = slice(begin, begin + num_queries)
        out[chunk] = attend_dense(q[chunk], keys, values, visible, **options)
    return out


def _chunks(batch: GPUAttentionBatch) -> list[tuple[int, int, int, int]]:
    """(row, first token, tokens, context) of every decode row and tile."""
    decoding = [(row, row, 1, length) for row, length in enumerate(batch.decode_lens.tolist()) if length]
    fields = (batch.tile_rows, batch.tile_tokens, batch.tile_lens, batch.tile_positions)
    tiles = zip(*(field.tolist() for field in fields), strict=True)
    return decoding + [(row, token, n, position + n) for row, token, n, position in tiles if n]


@dataclass
class StagedLoRA:
    """One group's pools."""

    pools: LoRAPools

    def add(self, ys: Sequence[Tensor], x: Tensor, batch: GPULoRABatch) -> None:
        check_tokens(ys, x, batch.caps.num_tokens, self.pools)
        rows = x.reshape(-1, x.shape[-1])
        for module, y in enumerate(ys):
            y_rows = y.view(-1, y.shape[-1])
            for token, start, weight in _entries(batch):
                end = start + int(self.pools.ranks[module, start])
                shrunk = rows[token].float() @ self.pools.a_pool[module, start:end].float().T
                delta = weight * (shrunk @ self.pools.b_pools[module][start:end].float())
                y_rows[token] = (y_rows[token].float() + delta).to(y.dtype)


def _entries(batch: GPULoRABatch) -> list[tuple[int, int, float]]:
    """(token, first pool row, weight)."""
    indptr = batch.row_indptr.tolist()
    found = [
        (int(batch.row_tokens[row]), int(batch.entry_starts[e]), float(batch.entry_weights[e]))
        for row in range(batch.caps.num_rows)
        for e in range(indptr[row], indptr[row + 1])
    ]
    for tile in range(batch.caps.num_tiles):
        begin, length = int(batch.tile_begins[tile]), int(batch.tile_lengths[tile])
        start, weight = int(batch.tile_starts[tile]), float(batch.tile_weights[tile])
        found += [(token, start, weight) for token in range(begin, begin + length)]
    return found


OPS = SimpleNamespace(bind=StagedLoRA, row_writer=row_writer)
"""LoRAOps whose batches come from a DeviceStep."""


@dataclass
class StagedAffine:
    """One group's sites."""

    table: AffineTable
    sites: Sequence[int]
    widths: Sequence[int]

    def apply(self, ys: Sequence[Tensor], batch: GPUAffineBatch) -> None:
        indptr = batch.indptr.tolist()
        for site, width, y in zip(self.sites, self.widths, ys, strict=True):
            rows_a_token(y, width, batch.caps.num_tokens)
            rows = y.view(batch.caps.num_tokens, -1, width)
            for i in range(batch.caps.num_affine):
                entries = range(indptr[i], indptr[i + 1])
                found = [(e, self.table.vectors.get((site, int(batch.entry_starts[e])))) for e in entries]
                parts = [float(batch.entry_weights[e]) * vectors for e, vectors in found if vectors is not None]
                if parts:
                    token, (gain, shift) = int(batch.tokens[i]), torch.stack(parts).sum(0)
                    rows[token] = (rows[token].float() * (1 + gain) + shift).to(y.dtype)


AFFINE_OPS = SimpleNamespace(bind_affine=StagedAffine)
"""AffineOps whose steps come from a DeviceStep."""
