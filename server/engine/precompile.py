"""Compiles the CPU kernels of a bfloat16 model before any server starts: `python -m server.engine.precompile`.

They are kept on disk. A server that does not find them compiles them itself, some 40 s of its first start.
"""

import sys
import time

import torch

from adapters.ops import bf16_dot
from adapters.ops import cpu_kernels as lora
from adapters.ops.thread_team import ThreadTeam
from server.engine import fused_kernels, fused_mlp_kernels, product_kernels
from server.engine.attention import cpu_kernels as attention
from server.engine.attention import prefill_kernels

KERNELS = (
    lora.add_bf16,
    lora.add_tile_bf16,
    attention.write_bf16,
    attention.attend_by_dots,
    prefill_kernels.attend_pieces,
    product_kernels.product,
    fused_mlp_kernels.silu_times,
    fused_kernels.RMS_NORM[torch.bfloat16],
    fused_kernels.ROTARY[torch.bfloat16],
    fused_kernels.ADD[torch.bfloat16],
)
"""Those a stock Llama-like model meets; others wait for a model that does."""


def main() -> None:
    if not bf16_dot.is_supported():
        return  # torch computes most of it
    began = time.monotonic()
    for kernel in KERNELS:
        assert kernel.address
    ThreadTeam(2).close()
    if (seconds := time.monotonic() - began) > 1:
        print(f"Compiled the CPU kernels in {seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
