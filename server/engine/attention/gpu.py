"""Attention on the GPU: three launches for decode steps, one more for rows with several new tokens. Triton kernels.

Every grid follows from the caps of the staged batch and from the layer's shape, so a captured graph serves any step of
its bucket. The partial sums of decode rows lie in scratch memory shared by all layers, which run one after another;
call `reserve` with the largest caps before capturing. Runs on CPU tensors under TRITON_INTERPRET=1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import next_power_of_2

from server.engine.attention import gpu_kernels, gpu_write_kernel
from server.engine.attention.gpu_batch import TILE_QUERIES, GPUAttentionBatch, StepCaps, num_tiles, stage
from server.engine.attention.interface import AttentionMetadata, KVLayer

MIN_SPLIT = 256
"""Keys below which a context is not split: 64 KB of K and V at head_dim 128 in bf16, four turns of the loop."""

MAX_SPLITS = 32
"""Splits of one context. Empty ones end at once, but each costs a program; a longer context has longer splits."""

# Tokens · heads of one program: two matrix-unit tiles of 64, K and V loaded once for both. float32 is multiplied in
# registers, and 128 rows would not fit them.
_TILE_ROWS = {2: 128, 4: 32}  # by bytes of an element
_SERVED = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a layer's tensors fix for all its launches."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    block_size: int
    itemsize: int  # bytes of an element

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def block_d(self) -> int:
        return max(16, int(next_power_of_2(self.head_dim)))

    @property
    def block_dv(self) -> int:
        return max(16, int(next_power_of_2(self.v_head_dim)))

    @property
    def block_n(self) -> int:
        """Keys taken at once: 16 KB of K, so that three stages of K and V fit the shared memory."""
        return min(64, max(16, 16384 // (self.block_d * self.itemsize)))

    def constants(self) -> dict[str, int]:
        return {
            "NUM_HEADS": self.num_heads,
            "KV_HEADS": self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "V_HEAD_DIM": self.v_head_dim,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_N": self.block_n,
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
        }


@dataclass(frozen=True, slots=True)
class _Scoring:
    """How scores are made in one layer."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None  # [num_heads]

    def arguments(self) -> dict[str, float]:
        return {"scale": self.scale, "softcap": self.softcap or 1.0, "window": self.window or 0}

    def constants(self) -> dict[str, bool]:
        return {"HAS_SOFTCAP": self.softcap is not None, "HAS_WINDOW": self.window is not None}


class GPUAttention:
    """An AttentionBackend; see interface.py for the arguments. One per engine, called from the engine's thread."""

    def __init__(self, *, min_split: int = MIN_SPLIT, max_splits: int = MAX_SPLITS) -> None:
        self._min_split, self._max_splits = min_split, max_splits
        # Outgrown ones stay: a graph captured before may still write to them.
        self._scratch: list[Tensor] = []
        self._staged: tuple[AttentionMetadata, GPUAttentionBatch] | None = None

    def reserve(
        self, caps: StepCaps, *, num_heads: int, v_head_dim: int, block_size: int, device: torch.device
    ) -> None:
        """Make the scratch memory that a step of `caps` needs, so that capturing it allocates none."""
        splits = self._num_splits(caps.max_blocks * block_size)
        self._scratch_of(caps.num_rows * num_heads * splits * (v_head_dim + 2), device)

    def __call__(
        self,
        q: Tensor,  # [num_tokens, num_heads, head_dim]
        k: Tensor,  # [num_tokens, num_kv_heads, head_dim]
        v: Tensor,  # [num_tokens, num_kv_heads, v_head_dim]
        layer: KVLayer,
        metadata: AttentionMetadata | GPUAttentionBatch,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:  # [num_tokens, num_heads, v_head_dim]
        batch = self._stage(metadata, q.device) if isinstance(metadata, AttentionMetadata) else metadata
        _check(q, layer, batch)
        num_tokens, num_heads, head_dim = q.shape
        block_size, num_kv_heads, v_head_dim = layer.v_cache.shape[1:]
        shape = _Shape(num_heads, num_kv_heads, head_dim, v_head_dim, block_size, q.element_size())
        scoring = _Scoring(scale, sliding_window, softcap, sinks)
        # Decode steps write all of it; elsewhere padding must not be what lay in memory before.
        make = q.new_empty if batch.caps.is_decode and batch.caps.num_rows == num_tokens else q.new_zeros
        out = make(num_tokens, num_heads, v_head_dim)
        _write(_dense(k), _dense(v), layer, batch, shape)
        q = _dense(q)
        self._decode(out, q, layer, batch, shape, scoring)
        _attend_tiles(out, q, layer, batch, shape, scoring)
        return out

    def _stage(self, metadata: AttentionMetadata, device: torch.device) -> GPUAttentionBatch:
        """Once per step, not per layer: for callers that did not stage it, such as the probe."""
        if self._staged is None or self._staged[0] is not metadata:
            self._staged = metadata, stage(metadata, device)
        return self._staged[1]

    def _num_splits(self, max_keys: int) -> int:
        """Splits of the grid: as many as any context of up to `max_keys` has."""
        return max(1, min(self._max_splits, -(-max_keys // self._min_split)))

    def _scratch_of(self, size: int, device: torch.device) -> Tensor:
        """float32 [size or more], the same memory for every layer."""
        if not self._scratch or self._scratch[-1].numel() < size:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"attention needs {4 * size} bytes of scratch memory: call reserve before capturing")
            self._scratch.append(torch.empty(next_power_of_2(size), dtype=torch.float32, device=device))
        return self._scratch[-1]

    def _decode(
        self, out: Tensor, q: Tensor, layer: KVLayer, batch: GPUAttentionBatch, shape: _Shape, scoring: _Scoring
    ) -> None:
        """out[t] for decode rows t, which may be any of the first num_rows tokens; 0 where row t is none."""
        num_rows = min(batch.caps.num_rows, len(q))
        if num_rows == 0:
            return
        max_keys = batch.caps.max_blocks * shape.block_size
        splits = self._num_splits(max_keys if scoring.window is None else min(max_keys, scoring.window))
        count = num_rows * shape.num_heads * splits
        acc, peak, total = self._scratch_of(count * (shape.v_head_dim + 2), q.device)[
            : count * (shape.v_head_dim + 2)
        ].split([count * shape.v_head_dim, count, count])
        limits: dict[str, Any] = {"MIN_SPLIT": self._min_split, "MAX_SPLITS": self._max_splits}
        gpu_kernels.attend_splits[num_rows, shape.num_kv_heads, splits](
            acc, peak, total, q, layer.k_cache, layer.v_cache, batch.decode_lens, batch.block_tables,
            q.stride(0), q.stride(1), batch.caps.max_blocks, splits, **scoring.arguments(),
            **shape.constants(), **scoring.constants(), **limits,
            BLOCK_M=max(16, next_power_of_2(shape.group)), num_warps=4, num_stages=5,  # two of K and V in flight
        )  # fmt: skip
        gpu_kernels.combine_splits[num_rows, shape.num_heads](
            out, acc, peak, total, batch.decode_lens, q if scoring.sinks is None else scoring.sinks,
            splits, scoring.window or 0, shape.num_heads, shape.v_head_dim,
            HAS_WINDOW=scoring.window is not None, HAS_SINKS=scoring.sinks is not None, **limits,
            BLOCK_SPLITS=next_power_of_2(self._max_splits), BLOCK_DV=shape.block_dv, num_warps=4,
        )  # fmt: skip


def _write(k: Tensor, v: Tensor, layer: KVLayer, batch: GPUAttentionBatch, shape: _Shape) -> None:
    """cache[slot_mapping[t]] = k[t], v[t]."""
    if len(k) == 0:
        return
    gpu_write_kernel.write_kv[len(k),](
        k, v, layer.k_cache, layer.v_cache, batch.slot_mapping, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        shape.num_kv_heads, shape.head_dim, shape.v_head_dim,
        BLOCK_H=next_power_of_2(shape.num_kv_heads), BLOCK_D=shape.block_d, BLOCK_DV=shape.block_dv, num_warps=4,
    )  # fmt: skip


def _attend_tiles(
    out: Tensor, q: Tensor, layer: KVLayer, batch: GPUAttentionBatch, shape: _Shape, scoring: _Scoring
) -> None:
    """out[t] for the tokens of tiles. After the decode rows, whose kernel writes zeros where a row is none."""
    tiles = num_tiles(batch.caps)
    if tiles == 0:
        return
    block_m = max(16, next_power_of_2(shape.group), _TILE_ROWS[shape.itemsize])
    parts = -(-TILE_QUERIES // (block_m // shape.group))
    gpu_kernels.attend_tiles[tiles, shape.num_kv_heads, parts](
        out, q, layer.k_cache, layer.v_cache, q if scoring.sinks is None else scoring.sinks,
        batch.tile_rows, batch.tile_tokens, batch.tile_positions, batch.tile_lens, batch.block_tables,
        q.stride(0), q.stride(1), batch.caps.max_blocks, **scoring.arguments(),
        **shape.constants(), **scoring.constants(), HAS_SINKS=scoring.sinks is not None,
        BLOCK_M=block_m, num_warps=8, num_stages=2,
    )  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    """x with its last dimension contiguous; a copy only where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q: Tensor, layer: KVLayer, batch: GPUAttentionBatch) -> None:
    caches = layer.k_cache, layer.v_cache
    if q.dtype not in _SERVED or any(cache.dtype is not q.dtype or not cache.is_contiguous() for cache in caches):
        raise ValueError(
            f"attention on GPU met queries of {q.dtype} and a cache of {caches[0].dtype}: both must be "
            "bfloat16 or both float32; load the base model with --dtype bfloat16 or float32"
        )
    if len(q) != batch.caps.num_tokens:
        raise RuntimeError(f"a step staged for {batch.caps.num_tokens} tokens met queries of {len(q)}")
