"""The Triton LoRA kernels compile for a Hopper GPU, without one, into the code they were written for."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.hopper_compiler import Compiled, run_program, stack_bytes

MAX_STACK = 16
"""Bytes a thread: the assembler may trade a register or two for one more program on a multiprocessor."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Compiled]:
    """(kernel, dtype) → its PTX and resources."""
    compiled = run_program(Path(__file__).with_name("compiled_gpu_lora.py"), tmp_path_factory.mktemp("triton"))
    return {(kernel["kernel"], kernel["dtype"].removeprefix("torch.")): kernel for kernel in compiled}


@pytest.mark.slow
def test_the_kernels_are_what_they_were_written_to_be(kernels: dict[tuple[str, str], Compiled]) -> None:
    names = {"shrink_rows", "expand_rows", "shrink_tiles", "expand_tiles"}
    assert set(kernels) == {(name, dtype) for name in names for dtype in ("bfloat16", "float32")}
    for (name, dtype), kernel in kernels.items():
        ptx, where = kernel["ptx"], f"{name} of {dtype}"
        assert not re.search(r"\b(atom|red)\.", ptx), f"{where} adds atomically: its sums depend on timing"
        assert stack_bytes(kernel) <= MAX_STACK, f"{where} spills: {kernel['usage']}"
        assert ("wgmma.mma_async" in ptx) is name.endswith("tiles"), f"{where} and the matrix units"
        assert re.search(r"ld\.global\S*\.v4|cp\.async\.cg\..*, 0x10,", ptx), (
            f"{where} reads less than 16 bytes at a time"
        )
