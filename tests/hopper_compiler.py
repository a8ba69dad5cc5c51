"""Compiles Triton launches for a Hopper GPU that need not be there.

The real launching code runs on CPU tensors, with kernels that compile for the arguments they get and go no further. Of
each kernel come its PTX and what cuobjdump says of registers and stack.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ROOT = Path(__file__).parents[1]

Compiled = dict[str, str]
"""kernel, ptx and usage, and whatever the program adds."""


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
    return str(re.findall(r"REG:\d+ STACK:\d+", lines)[-1])


def compile_launches(launch: Callable[[], object], **places: Any) -> list[Compiled]:
    """Every kernel that `launch` launches, once each; places: kernel's name → the module it is launched from."""
    driver.set_active(HopperDriver())
    found: list[Any] = []
    kernels = {name: vars(module)[name] for name, module in places.items()}
    for name, module in places.items():
        vars(module)[name] = CompileOnly(kernels[name], found)
    try:
        launch()
    finally:
        for name, module in places.items():
            vars(module)[name] = kernels[name]
    kept = {kernel.name: kernel for kernel in found}.values()
    return [{"kernel": k.name, "ptx": k.asm["ptx"], "usage": usage(k.asm["cubin"])} for k in kept]


def run_program(path: Path, cache: Path) -> list[Compiled]:
    """What a program that prints such a list finds, compiled afresh in a process that does not interpret."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(path)], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Compiled] = json.loads(done.stdout)
    return found


def stack_bytes(kernel: Compiled) -> int:
    """Of one thread: what the assembler spilled."""
    return int(kernel["usage"].rpartition(":")[2])
