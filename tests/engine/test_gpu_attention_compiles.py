"""The Triton attention kernels compile for a Hopper GPU, without one, into the code they were written for."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.hopper_compiler import Compiled, run_program, stack_bytes

KERNELS = {"write_kv", "attend_splits", "combine_splits", "attend_tiles"}
LAYERS = {"bfloat16 llama-8b", "bfloat16 windowed", "float32 small"}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Compiled]:
    """(kernel, layer) → its PTX and resources."""
    compiled = run_program(Path(__file__).with_name("compiled_gpu_attention.py"), tmp_path_factory.mktemp("triton"))
    return {(kernel["kernel"], kernel["layer"]): kernel for kernel in compiled}


@pytest.mark.slow
def test_the_kernels_are_what_they_were_written_to_be(kernels: dict[tuple[str, str], Compiled]) -> None:
    assert set(kernels) == {(name, layer) for name in KERNELS for layer in LAYERS}
    for (name, layer), kernel in kernels.items():
        ptx, where, attends = kernel["ptx"], f"{name} of {layer}", name.startswith("attend")
        is_bfloat16 = layer.startswith("bfloat16")
        assert not re.search(r"\b(atom|red)\.", ptx), f"{where} adds atomically: its sums depend on timing"
        assert stack_bytes(kernel) == 0, f"{where} spills: {kernel['usage']}"
        assert "tf32" not in ptx, f"{where} rounds float32 products to TF32"
        assert bool(re.search(r"cp\.async\.cg\..*, 0x10,", ptx)) is attends, f"{where} and loads ahead of their use"
        # 16 or so query heads of a decode row fill one mma; only tiles are large enough for a warp group's.
        assert ("wgmma.mma_async" in ptx) is (is_bfloat16 and name == "attend_tiles"), f"{where} and wgmma"
        assert ("mma.sync" in ptx) is (is_bfloat16 and name == "attend_splits"), f"{where} and mma"
