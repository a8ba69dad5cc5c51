"""What is compiled ahead is what a bfloat16 model meets."""

from types import ModuleType

import pytest

from adapters.ops import cpu_kernels as lora
from adapters.ops.chunk_kernel import ChunkKernel
from server.engine import fused_kernels, fused_mlp_kernels, precompile, product_kernels
from server.engine.attention import cpu_kernels as attention
from server.engine.attention import prefill_kernels

LATER = {"attend_bf16"}  # for heads of other sizes than nearly all models have


@pytest.mark.parametrize(
    "module", [lora, attention, prefill_kernels, product_kernels, fused_mlp_kernels, fused_kernels], ids=str
)
def test_every_bfloat16_kernel_is_compiled_ahead(module: ModuleType) -> None:
    kernels = {name: each for name, each in vars(module).items() if isinstance(each, ChunkKernel)}
    assert kernels
    for name, kernel in kernels.items():
        assert (kernel in precompile.KERNELS) == (not name.endswith("_f32") and name not in LATER), name
