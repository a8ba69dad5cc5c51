"""Run as a program: compiles, for a Hopper GPU that need not be there, what one LoRA launch of each kind would run.

The real launching code runs on CPU tensors, with kernels that compile for the arguments they get and go no further.
Prints a JSON list of {kernel, dtype, ptx, usage}: the usage is what cuobjdump says of registers and stack.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from adapters.lora_batch import LoRABatch
from adapters.ops import gpu
from adapters.ops.interface import LoRAPools

KERNELS = ("shrink_rows", "expand_rows", "shrink_tiles", "expand_tiles")


class HopperDriver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class CompileOnly:
    """Stands for a kernel; kernel[grid](...) compiles it."""

    def __init__(self, kernel: Any, found: list[Any]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self._found.append(self._kernel.warmup(*args, grid=grid, **options))


def usage(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"REG:\d+ STACK:\d+", lines)[-1]


def compile_group(dtype: torch.dtype, in_features: int, outs: tuple[int, ...]) -> list[dict[str, str]]:
    pools = LoRAPools(
        torch.zeros(len(outs), 32, in_features, dtype=dtype),
        tuple(torch.zeros(32, out, dtype=dtype) for out in outs),
        torch.zeros(len(outs), 32, dtype=torch.int32),
    )
    batch = LoRABatch.build([1, 20], [((0, 1.0),), ((16, 1.0),)], min_segment=16)
    assert batch is not None
    x, *ys = (torch.zeros(21, width, dtype=dtype) for width in (in_features, *outs))
    found: list[Any] = []
    kernels = {name: getattr(gpu, name) for name in KERNELS}
    vars(gpu).update({name: CompileOnly(kernel, found) for name, kernel in kernels.items()})
    gpu.bind(pools).add(ys, x, gpu.stage(batch, torch.device("cpu")))
    vars(gpu).update(kernels)
    kept = {kernel.name: kernel for kernel in found}.values()
    return [{"kernel": k.name, "dtype": str(dtype), "ptx": k.asm["ptx"], "usage": usage(k.asm["cubin"])} for k in kept]


if __name__ == "__main__":
    driver.set_active(HopperDriver())  # type: ignore[no-untyped-call]
    compiled = [*compile_group(torch.bfloat16, 4096, (4096, 1024)), *compile_group(torch.float32, 576, (192,))]
    json.dump(compiled, sys.stdout)
