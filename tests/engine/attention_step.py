"""One step's attention arguments, random, for every backend's tests. Needs neither numba nor Triton."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.attention.interface import AttentionMetadata, KVLayer

# Largest absolute error on inputs from N(0, 1), where outputs are averages of values up to about 4 in size.
# float32: sums of up to 200 terms at 6e-8 each. bf16: the output is rounded once (2^-9 of 4), and SDPA rounds weights.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.5e-2}


@dataclass
class Step:
    """One step's arguments, with the history of every row already in the cache."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layer: KVLayer
    metadata: AttentionMetadata

    def clone(self) -> "Step":
        layer = KVLayer(self.layer.k_cache.clone(), self.layer.v_cache.clone())
        return Step(self.q, self.k, self.v, layer, self.metadata)


def make_step(
    rows: Sequence[tuple[int, int]],  # (new tokens, history) each; rows with one new token first
    *,
    num_heads: int = 9,
    num_kv_heads: int = 3,
    head_dim: int = 64,
    v_head_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Step:
    """Random tokens, with the rows' blocks permuted over the whole cache."""
    generator = torch.Generator().manual_seed(seed)
    context_lens = np.array([new + history for new, history in rows], np.int32)
    max_blocks = -(-int(context_lens.max()) // block_size)
    num_blocks = len(rows) * max_blocks + 3
    permuted = np.random.default_rng(seed).permutation(num_blocks)[: len(rows) * max_blocks]
    tables = permuted.reshape(len(rows), max_blocks).astype(np.int32)
    slots = [
        int(tables[row, at // block_size]) * block_size + at % block_size
        for row, (new, history) in enumerate(rows)
        for at in range(history, history + new)
    ]
    metadata = AttentionMetadata(
        query_starts=np.cumsum([0, *(new for new, _ in rows)]).astype(np.int32),
        context_lens=context_lens,
        block_tables=tables,
        slot_mapping=np.array(slots, np.int64),
        num_decode_rows=sum(1 for new, _ in rows if new == 1),
    )
    v_head_dim = v_head_dim or head_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return Step(
        normal(len(slots), num_heads, head_dim),
        normal(len(slots), num_kv_heads, head_dim),
        normal(len(slots), num_kv_heads, v_head_dim),
        KVLayer(
            normal(num_blocks, block_size, num_kv_heads, head_dim),
            normal(num_blocks, block_size, num_kv_heads, v_head_dim),
        ),
        metadata,
    )
