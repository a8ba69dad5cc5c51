"""Run as a program: compiles the affine kernel for a Hopper GPU that need not be there (tests/hopper_compiler.py)."""

import json
import sys

import numpy as np
import torch

from adapters.lora_batch import LoRABatch
from adapters.ops import AffineTable, gpu_affine
from tests.hopper_compiler import Compiled, compile_launches


def compile_sites(dtype: torch.dtype, widths: tuple[int, ...], rows: int) -> list[Compiled]:
    table = AffineTable(len(widths), 32, torch.device("cpu"))
    lora = LoRABatch.build([1, 20], [((0, 1.0),), ((16, 1.0),)], min_segment=16)
    assert lora is not None
    staged = gpu_affine.stage_affine(lora, np.arange(21, dtype=np.int32), torch.device("cpu"))
    ys = [torch.zeros(21, rows * width, dtype=dtype) for width in widths]
    bound = gpu_affine.bind_affine(table, range(len(widths)), widths)
    compiled = compile_launches(lambda: bound.apply(ys, staged), correct_tokens=gpu_affine)
    return [{**kernel, "dtype": str(dtype), "rows": str(rows)} for kernel in compiled]


if __name__ == "__main__":
    found = [
        *compile_sites(torch.bfloat16, (4096, 1024, 1024), 1),
        *compile_sites(torch.bfloat16, (128,), 32),
        *compile_sites(torch.float32, (576,), 1),
    ]
    json.dump(found, sys.stdout)
