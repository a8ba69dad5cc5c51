"""The Triton affine kernel compiles for a Hopper GPU, without one, into the code it was written for."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.hopper_compiler import run_program, stack_bytes


@pytest.mark.slow
def test_the_kernel_is_what_it_was_written_to_be(tmp_path: Path) -> None:
    compiled = run_program(Path(__file__).with_name("compiled_gpu_affine.py"), tmp_path)
    assert [(kernel["dtype"], kernel["rows"]) for kernel in compiled] == [
        ("torch.bfloat16", "1"),
        ("torch.bfloat16", "32"),
        ("torch.float32", "1"),
    ]
    for kernel in compiled:
        ptx, where = kernel["ptx"], f"{kernel['dtype']} with {kernel['rows']} rows a token"
        assert not re.search(r"\b(atom|red)\.", ptx), f"{where} adds atomically: its sums depend on timing"
        assert stack_bytes(kernel) == 0, f"{where} spills: {kernel['usage']}"
        if kernel["rows"] == "1":  # a head's vectors are one element a thread
            assert re.search(r"ld\.global\S*\.v4\.b32", ptx), f"{where} reads vectors less than 16 bytes at a time"
