"""Attention on CPU: a numba kernel for rows with one new token, torch's SDPA over gathered blocks for longer rows.

What depends on the step alone (which rows are long, their masks and block ids) is worked out once and used by all
layers; what depends on a layer alone (numpy views of its cache) once in its life.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy.typing as npt
import torch
from numba import types
from numba.np.numpy_support import from_dtype
from torch import Tensor
from torch.nn import functional

from adapters.ops.bf16 import STORAGE, as_numpy
from adapters.ops.numba_kernels import available_threads, entry_point, use_threads
from server.engine.attention import cpu_kernels
from server.engine.attention.interface import AttentionMetadata, KVLayer
from server.engine.attention.reference import attend_dense, visible_mask

PARALLEL_CONTEXT = 64
"""Tokens of context, summed over a step's decode rows, from which a second thread pays for its barrier."""


@dataclass(slots=True)
class _Chunk:
    """One row with several new tokens, [begin, end) of the packed batch, the last ones of its context."""

    begin: int
    end: int
    context_len: int
    blocks: Tensor  # int64 [ceil(context_len / block_size)]
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def num_queries(self) -> int:
        return self.end - self.begin

    def first_visible(self, window: int | None) -> int:
        """The earliest token any of the new ones sees; earlier ones need not be gathered."""
        return 0 if window is None else max(0, self.context_len - self.num_queries - window + 1)

    def mask(self, window: int | None, skipped: int, dtype: torch.dtype) -> Tensor:
        """[num_queries, context_len - skipped] of 0 and -inf, built once per step."""
        found = self.masks.get((window, dtype))
        if found is None:
            visible = visible_mask(self.num_queries, self.context_len, window)[:, skipped:]
            found = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)
            self.masks[window, dtype] = found
        return found


@dataclass(frozen=True)
class _StepPlan:
    """What all layers share in one step."""

    metadata: AttentionMetadata

    @cached_property
    def chunks(self) -> tuple[_Chunk, ...]:
        starts, lens = self.metadata.query_starts.tolist(), self.metadata.context_lens.tolist()
        rows = range(self.metadata.num_decode_rows, len(lens))
        tables = torch.from_numpy(self.metadata.block_tables).long()
        return tuple(_Chunk(starts[row], starts[row + 1], lens[row], tables[row]) for row in rows)

    @cached_property
    def decode_context(self) -> int:
        """Tokens of context of all decode rows together."""
        return int(self.metadata.context_lens[: self.metadata.num_decode_rows].sum())


@dataclass(frozen=True, slots=True)
class _LayerViews:
    """The cache of one layer as the kernel reads it: [num_slots, num_kv_heads, dim]. Holds the layer, so ids stay."""

    layer: KVLayer
    k_cache: npt.NDArray[Any]
    v_cache: npt.NDArray[Any]


class CPUAttention:
    """An AttentionBackend; see interface.py for the arguments. One per engine, called from the engine's thread."""

    def __init__(self) -> None:
        self._num_threads = available_threads()
        self._layers: dict[int, _LayerViews] = {}
        self._plan: _StepPlan | None = None

    def __call__(
        self,
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
    ) -> Tensor:  # [num_tokens, num_heads, v_head_dim]
        plan = self._plan_of(metadata)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        self._write_and_decode(out, q, k, v, layer, plan, scale, sliding_window, softcap, sinks)
        for chunk in plan.chunks:
            rows = slice(chunk.begin, chunk.end)
            heads = q[rows], k[rows], v[rows]
            out[rows] = _attend_chunk(*heads, layer, chunk, scale, sliding_window, softcap, sinks)
        return out

    def _plan_of(self, metadata: AttentionMetadata) -> _StepPlan:
        if self._plan is None or self._plan.metadata is not metadata:
            self._plan = _StepPlan(metadata)
        return self._plan

    def _views(self, layer: KVLayer, dtype: torch.dtype) -> _LayerViews:
        views = self._layers.get(id(layer))
        if views is None:
            caches = layer.k_cache, layer.v_cache
            if dtype not in STORAGE or any(cache.dtype is not dtype or not cache.is_contiguous() for cache in caches):
                raise ValueError(
                    f"attention on CPU met queries of {dtype} and a cache of {caches[0].dtype}: both must be "
                    "bfloat16 or both float32; load the base model with --dtype bfloat16 or float32"
                )
            views = _LayerViews(layer, *(as_numpy(cache).reshape(-1, *cache.shape[2:]) for cache in caches))
            self._layers[id(layer)] = views
        return views

    def _write_and_decode(
        self,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: KVLayer,
        plan: _StepPlan,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        views, metadata = self._views(layer, q.dtype), plan.metadata
        num_rows, num_kv_heads = metadata.num_decode_rows, layer.k_cache.shape[2]
        threaded = self._num_threads > 1 and plan.decode_context >= PARALLEL_CONTEXT
        if threaded:
            use_threads(self._num_threads)
        # The heads of a row stay together, since their K lie together, unless there are too few rows to share out.
        splits = num_kv_heads if threaded and num_rows < 2 * self._num_threads else 1
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        _compiled(q.dtype, threaded, window is not None, softcap is not None, sinks is not None)(
            out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), views.k_cache, views.v_cache,
            metadata.slot_mapping, metadata.block_tables, metadata.context_lens,
            num_rows, q.shape[1], layer.k_cache.shape[1], splits, scale, window, softcap,
            None if sinks is None else sinks.float().numpy(),
        )  # fmt: skip


def _attend_chunk(
    q: Tensor,  # [num_queries, num_heads, head_dim]
    k: Tensor,  # [num_queries, num_kv_heads, head_dim]
    v: Tensor,  # [num_queries, num_kv_heads, v_head_dim]
    layer: KVLayer,
    chunk: _Chunk,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # [num_queries, num_heads, v_head_dim]
    """softmax(scale · q · Kᵀ) · V for one row with several new tokens."""
    skipped = 0
    has_history = chunk.context_len > chunk.num_queries
    if has_history:
        block_size = layer.k_cache.shape[1]
        first_block = chunk.first_visible(window) // block_size
        skipped = first_block * block_size
        blocks = chunk.blocks[first_block : -(-chunk.context_len // block_size)]
        length = chunk.context_len - skipped
        k = layer.k_cache.index_select(0, blocks).flatten(0, 1)[:length]
        v = layer.v_cache.index_select(0, blocks).flatten(0, 1)[:length]
    if softcap is not None or sinks is not None:
        visible = visible_mask(chunk.num_queries, chunk.context_len, window)[:, skipped:]
        return attend_dense(q, k, v, visible, scale=scale, softcap=softcap, sinks=sinks)
    is_plain = not has_history and (window is None or window >= chunk.context_len)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=None if is_plain else chunk.mask(window, skipped, q.dtype),
        is_causal=is_plain,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


@cache
def _compiled(
    dtype: torch.dtype, threaded: bool, has_window: bool, has_softcap: bool, has_sinks: bool
) -> Callable[..., None]:
    """The kernel's entry point for one combination; the machine code lies on disk after the first time."""
    caches = types.Array(from_dtype(STORAGE[dtype]), 3, "C")
    arrays = (types.Array(types.int64, 1, "C"), types.Array(types.int32, 2, "C"), types.Array(types.int32, 1, "C"))
    sinks = types.Array(types.float32, 1, "C") if has_sinks else types.none
    options = (types.int64 if has_window else types.none, types.float32 if has_softcap else types.none, sinks)
    signature = (*[types.int64] * 4, caches, caches, *arrays, *[types.int64] * 4, types.float32, *options)
    return entry_point(cpu_kernels.step_parallel if threaded else cpu_kernels.step, signature)
