"""The Triton LoRA kernels compile for a Hopper GPU, without one, into the code they were written for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]

MAX_STACK = 16
"""Bytes a thread: the assembler may trade a register or two for one more program on a multiprocessor."""

Kernel = dict[str, str]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Kernel]:
    """(kernel, dtype) → its PTX and resources, compiled afresh in a process that does not interpret."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests/adapters/compiled_gpu_lora.py")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {(kernel["kernel"], kernel["dtype"].removeprefix("torch.")): kernel for kernel in json.loads(done.stdout)}


@pytest.mark.slow
def test_the_kernels_are_what_they_were_written_to_be(kernels: dict[tuple[str, str], Kernel]) -> None:
    names = {"shrink_rows", "expand_rows", "shrink_tiles", "expand_tiles"}
    assert set(kernels) == {(name, dtype) for name in names for dtype in ("bfloat16", "float32")}
    for (name, dtype), kernel in kernels.items():
        ptx, where = kernel["ptx"], f"{name} of {dtype}"
        assert not re.search(r"\b(atom|red)\.", ptx), f"{where} adds atomically: its sums depend on timing"
        assert int(kernel["usage"].rpartition(":")[2]) <= MAX_STACK, f"{where} spills: {kernel['usage']}"
        assert ("wgmma.mma_async" in ptx) is name.endswith("tiles"), f"{where} and the matrix units"
        assert re.search(r"ld\.global\S*\.v4|cp\.async\.cg\..*, 0x10,", ptx), (
            f"{where} reads less than 16 bytes at a time"
        )
