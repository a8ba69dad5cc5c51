"""Run as a program: compiles, for a Hopper GPU that need not be there, what one LoRA launch of each kind would run.

Prints a JSON list of {kernel, dtype, ptx, usage}; see tests/hopper_compiler.py.
"""

import json
import sys

import torch

from adapters.lora_batch import LoRABatch
from adapters.ops import gpu
from adapters.ops.interface import LoRAPools
from tests.hopper_compiler import Compiled, compile_launches

KERNELS = ("shrink_rows", "expand_rows", "shrink_tiles", "expand_tiles")


def compile_group(dtype: torch.dtype, in_features: int, outs: tuple[int, ...]) -> list[Compiled]:
    pools = LoRAPools(
        torch.zeros(len(outs), 32, in_features, dtype=dtype),
        tuple(torch.zeros(32, out, dtype=dtype) for out in outs),
        torch.zeros(len(outs), 32, dtype=torch.int32),
    )
    batch = LoRABatch.build([1, 20], [((0, 1.0),), ((16, 1.0),)], min_segment=16)
    assert batch is not None
    staged = gpu.stage(batch, torch.device("cpu"))
    x, *ys = (torch.zeros(21, width, dtype=dtype) for width in (in_features, *outs))
    compiled = compile_launches(lambda: gpu.bind(pools).add(ys, x, staged), **dict.fromkeys(KERNELS, gpu))
    return [{**kernel, "dtype": str(dtype)} for kernel in compiled]


if __name__ == "__main__":
    found = [*compile_group(torch.bfloat16, 4096, (4096, 1024)), *compile_group(torch.float32, 576, (192,))]
    json.dump(found, sys.stdout)
