"""The tensors of the paged KV cache: how many blocks a budget buys, and one K and one V tensor per layer.

Which block belongs to whom is the block manager's business; this module only knows shapes and bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.engine.attention.interface import KVLayer


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer stores per token: K as [num_kv_heads, head_dim], V as [num_kv_heads, v_head_dim]."""

    num_kv_heads: int
    head_dim: int
    v_head_dim: int

    @property
    def num_values(self) -> int:
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)


def block_bytes(shapes: Sequence[KVShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes one block takes in all layers together."""
    return sum(shape.num_values for shape in shapes) * block_size * dtype.itemsize


def num_blocks_for(shapes: Sequence[KVShape], block_size: int, dtype: torch.dtype, memory: int) -> int:
    """How many blocks fit into `memory` bytes; raises ValueError when not even one does."""
    each = block_bytes(shapes, block_size, dtype)
    if memory < each:
        raise ValueError(
            f"--kv-cache-memory {memory} bytes is less than one block ({each} bytes for {block_size} tokens); raise it"
        )
    return memory // each


def allocate(
    shapes: Sequence[KVShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[KVLayer]:
    """One KVLayer per entry of `shapes`. Zeros, so that a slot never written reads as a number."""

    def tensor(num_kv_heads: int, head_dim: int) -> torch.Tensor:
        return torch.zeros(num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype, device=device)

    return [KVLayer(tensor(s.num_kv_heads, s.head_dim), tensor(s.num_kv_heads, s.v_head_dim)) for s in shapes]
