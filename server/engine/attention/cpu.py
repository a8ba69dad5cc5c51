"""Attention on CPU: a kernel for rows with one new token, another for longer rows of bfloat16 where it fits, and
torch's SDPA over gathered blocks for the rest.

What depends on the step alone (which rows are long, their masks and block ids) is worked out once and used by all
layers.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from adapters.ops import bf16_dot
from adapters.ops.thread_team import KernelArguments, current_team
from server.engine.attention import cpu_kernels as kernels
from server.engine.attention import decode_bf16
from server.engine.attention import prefill_kernels as prefill
from server.engine.attention.interface import AttentionMetadata, KVLayer
from server.engine.attention.reference import attend_dense, visible_mask


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
        if self.metadata.num_decode_rows == len(self.metadata.context_lens):
            return ()
        starts, lens = self.metadata.query_starts.tolist(), self.metadata.context_lens.tolist()
        rows = range(self.metadata.num_decode_rows, len(lens))
        tables = torch.from_numpy(self.metadata.block_tables).long()
        return tuple(_Chunk(starts[row], starts[row + 1], lens[row], tables[row]) for row in rows)

    @cached_property
    def pieces(self) -> npt.NDArray[np.int64]:
        """[num_pieces, 4] the chunks' tokens in pieces to share out, as prefill_kernels.py reads them."""
        found = [
            (row, begin, min(prefill.QUERIES, chunk.end - begin), chunk.context_len - (chunk.end - begin) + 1)
            for row, chunk in enumerate(self.chunks, start=self.metadata.num_decode_rows)
            for begin in range(chunk.begin, chunk.end, prefill.QUERIES)
        ]
        return np.array(found, np.int64).reshape(-1, prefill.PIECE_FIELDS)

    @cached_property
    def fields(self) -> tuple[int, ...]:
        """The step's fields as the kernels read them."""
        metadata = self.metadata
        arrays = (metadata.slot_mapping, metadata.block_tables, metadata.context_lens, self.pieces)
        assert all(array.flags.c_contiguous for array in arrays)
        return (*(array.ctypes.data for array in arrays), metadata.block_tables.shape[1])


_KERNELS = {
    torch.bfloat16: (kernels.write_bf16, kernels.attend_bf16),
    torch.float32: (kernels.write_f32, kernels.attend_f32),
}
"""(write, attend) by the dtype of cache and queries."""


class CPUAttention:
    """An AttentionBackend; see interface.py for the arguments. One per engine, called from the engine's thread."""

    def __init__(self) -> None:
        self._team = current_team()
        self._arguments = KernelArguments(np.zeros(kernels.NUM_FIELDS, np.int64))
        self._numbers = self._arguments.fields.view(np.float32)[2 * kernels.NUMBERS :][:2]
        self._step = KernelArguments(np.zeros(kernels.NUM_STEP_FIELDS, np.int64))
        self._arguments.fields[kernels.STEP] = self._step.address
        self._checked: dict[int, KVLayer] = {}  # by id; held, so that ids stay
        self._absent: dict[int, Tensor] = {}  # sinks that are none, by the number of heads
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
        plan = self.prepare(metadata)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # held here, since the kernels know addresses only
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        self._write_and_decode(out, q, k, v, layer, plan, scale, sliding_window, softcap, sinks)
        if plan.chunks and self._suits_kernel(q, v, sliding_window, softcap, sinks):
            self._team.run(prefill.attend_pieces.address, self._arguments, len(plan.pieces) * k.shape[1])
            return out
        for chunk in plan.chunks:
            rows = slice(chunk.begin, chunk.end)
            heads = q[rows], k[rows], v[rows]
            out[rows] = _attend_chunk(*heads, layer, chunk, scale, sliding_window, softcap, sinks)
        return out

    def prepare(self, metadata: AttentionMetadata) -> _StepPlan:
        """Let kernels, recorded ones too, read this step's metadata; the first layer of a forward pass does."""
        if self._plan is None or self._plan.metadata is not metadata:
            self._plan = _StepPlan(metadata)
            self._step.fields[:] = self._plan.fields
        return self._plan

    @staticmethod
    def _suits_kernel(q: Tensor, v: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None) -> bool:
        """Whether our kernel serves rows with several new tokens, rather than torch's."""
        is_plain = window is None and softcap is None and sinks is None
        fits = is_plain and q.dtype is torch.bfloat16 and prefill.suits(q.shape[2], v.shape[2])
        return fits and bf16_dot.is_supported()

    def _no_sinks(self, num_heads: int) -> Tensor:
        if num_heads not in self._absent:
            self._absent[num_heads] = torch.full((num_heads,), -torch.inf)
        return self._absent[num_heads]

    def _check(self, layer: KVLayer, dtype: torch.dtype) -> None:
        """Once per layer: caches the kernels can read."""
        caches = layer.k_cache, layer.v_cache
        if dtype not in _KERNELS or any(cache.dtype is not dtype or not cache.is_contiguous() for cache in caches):
            raise ValueError(
                f"attention on CPU met queries of {dtype} and a cache of {caches[0].dtype}: both must be "
                "bfloat16 or both float32; load the base model with --dtype bfloat16 or float32"
            )
        self._checked[id(layer)] = layer

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
        if id(layer) not in self._checked:
            self._check(layer, q.dtype)
        num_rows, fields = plan.metadata.num_decode_rows, self._arguments.fields
        num_blocks, block_size, num_kv_heads, head_dim = layer.k_cache.shape
        # The heads of a row stay together, since their K lie together, unless there are too few rows to share out.
        splits = num_kv_heads if num_rows < 2 * self._team.num_threads else 1
        sinks = self._no_sinks(q.shape[1]) if sinks is None else sinks.float().contiguous()
        tensors = (out, q, k, v, layer.k_cache, layer.v_cache, sinks)
        fields[: kernels.STEP] = [tensor.data_ptr() for tensor in tensors]
        fields[kernels.NUM_TOKENS : kernels.NUMBERS] = (
            len(q), num_blocks * block_size, q.shape[1], num_kv_heads, head_dim, v.shape[2], num_rows, block_size,
            splits, kernels.NO_WINDOW if window is None else window,
        )  # fmt: skip
        self._numbers[kernels.SCALE], self._numbers[kernels.SOFTCAP] = scale, softcap or 0.0
        write, attend = _KERNELS[q.dtype]
        if q.dtype is torch.bfloat16 and bf16_dot.is_supported() and decode_bf16.suits(head_dim, v.shape[2]):
            attend = kernels.attend_by_dots
        # All K and V stand before anything is read: a row may read a block that another row fills in this very step.
        self._team.run(write.address, self._arguments, -(-len(q) // kernels.WRITE_CHUNK))
        if num_rows:
            self._team.run(attend.address, self._arguments, num_rows * splits)


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
