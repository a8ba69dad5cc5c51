"""Run as a program: compiles, for a Hopper GPU that need not be there, what attention runs for three layers.

Prints a JSON list of {kernel, layer, ptx, usage}; see tests/hopper_compiler.py.
"""

import json
import sys
from typing import Any

import numpy as np
import torch

from server.engine.attention import gpu_batch, gpu_kernels, gpu_write_kernel
from server.engine.attention.gpu import GPUAttention
from server.engine.attention.interface import AttentionMetadata, KVLayer
from tests.hopper_compiler import Compiled, compile_launches

PLACES: dict[str, Any] = {
    "write_kv": gpu_write_kernel,
    "attend_splits": gpu_kernels,
    "combine_splits": gpu_kernels,
    "attend_tiles": gpu_kernels,
}
BLOCK_SIZE = 16


def mixed_step() -> AttentionMetadata:
    """A row with one new token behind 15, and one with 20 new tokens behind none: both routes."""
    return AttentionMetadata(
        query_starts=np.array([0, 1, 21], np.int32),
        context_lens=np.array([16, 20], np.int32),
        block_tables=np.array([[0, 0], [1, 2]], np.int32),
        slot_mapping=np.array([15, *range(16, 36)], np.int64),
        num_decode_rows=1,
    )


def compile_layer(
    name: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, *, is_modified: bool = False
) -> list[Compiled]:
    """`is_modified` with a sliding window, a softcap and sinks."""
    q, k, v = (torch.zeros(21, n, dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    layer = KVLayer(*(torch.zeros(3, BLOCK_SIZE, kv_heads, dim, dtype=dtype) for _ in range(2)))
    staged, attend = gpu_batch.stage(mixed_step(), torch.device("cpu")), GPUAttention()
    options: dict[str, Any] = {"scale": 0.1, "sliding_window": None, "softcap": None}
    if is_modified:
        options = {"scale": 0.1, "sliding_window": 1024, "softcap": 50.0, "sinks": torch.zeros(heads, dtype=dtype)}
    compiled = compile_launches(lambda: attend(q, k, v, layer, staged, **options), **PLACES)
    return [{**kernel, "layer": name} for kernel in compiled]


if __name__ == "__main__":
    found = [
        *compile_layer("bfloat16 llama-8b", torch.bfloat16, 32, 8, 128),
        *compile_layer("bfloat16 windowed", torch.bfloat16, 8, 4, 64, is_modified=True),
        *compile_layer("float32 small", torch.float32, 9, 3, 64),
    ]
    json.dump(found, sys.stdout)
