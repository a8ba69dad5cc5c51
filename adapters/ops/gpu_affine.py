"""The affine operation on CUDA: one Triton launch a group, a program for a token and a block of outputs.

The grid follows from the buffer's capacities, nothing is allocated and nothing read back, so `apply` may be captured
into a graph and replayed over whatever was staged since. Knows neither adapters nor graphs.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from adapters.extras_batch import IntArray32
from adapters.lora_batch import LoRABatch
from adapters.ops.affine_interface import AffineTable, rows_a_token
from adapters.ops.gpu_affine_batch import AffineStaging, AffineStep, GPUAffineBatch
from adapters.ops.gpu_affine_kernels import correct_tokens
from adapters.ops.gpu_blocks import MAX_MODULES

_DTYPES = (torch.bfloat16, torch.float32)
_BLOCK = 512  # outputs a program has, of all its rows together: 4 a thread, 4 KiB of vectors


class GPUAffine:
    """One group's sites and the blocks their widths ask for."""

    __slots__ = ("_block_n", "_first_blocks", "_sites", "_table", "_widths")

    def __init__(self, table: AffineTable, sites: Sequence[int], widths: Sequence[int]) -> None:
        if len(sites) > MAX_MODULES:
            raise ValueError(f"a group of {len(sites)} modules is over the {MAX_MODULES} of one launch: split it")
        self._table = table  # its addresses never move
        self._sites = torch.tensor(list(sites), dtype=torch.int32, device=table.addresses.device)  # [num_modules]
        self._widths = tuple(widths)
        self._block_n = min(_BLOCK, 1 << (max(widths) - 1).bit_length())
        # Block i belongs to module m for first[m] <= i < first[m + 1], [num_modules + 1].
        self._first_blocks = tuple(accumulate((-(-width // self._block_n) for width in widths), initial=0))

    def apply(self, ys: Sequence[Tensor], staged: GPUAffineBatch) -> None:
        """y_m[t] = y_m[t] ⊙ (1 + Σ_e weight_e · d_e) + Σ_e weight_e · c_e for the tokens that have vectors."""
        if ys[0].dtype not in _DTYPES or any(y.dtype is not ys[0].dtype for y in ys):
            raise RuntimeError(
                f"affine vectors met outputs of {[y.dtype for y in ys]}: float32 and bfloat16 are served"
            )
        num_tokens, num_affine = staged.caps.num_tokens, staged.caps.num_affine
        rows = tuple(rows_a_token(y, width, num_tokens) for y, width in zip(ys, self._widths, strict=True))
        if not num_affine:
            return
        step = (staged.tokens, staged.indptr, staged.entry_starts, staged.entry_weights)
        correct_tokens[(num_affine, self._first_blocks[-1])](
            *(tuple(ys), self._table.addresses, self._sites, *step, self._table.addresses.shape[1]),
            ROWS=rows,
            WIDTHS=self._widths,
            FIRST_BLOCKS=self._first_blocks,
            NUM_MODULES=len(ys),
            BLOCK_ROWS=min(_BLOCK // self._block_n, 1 << (max(rows) - 1).bit_length()),
            BLOCK_N=self._block_n,
            num_warps=4,
        )


def bind_affine(table: AffineTable, sites: Sequence[int], widths: Sequence[int]) -> GPUAffine:
    return GPUAffine(table, sites, widths)


def stage_affine(batch: LoRABatch, tokens: IntArray32, device: torch.device | None = None) -> GPUAffineBatch:
    """The step on `device` (the current CUDA device) at its own size: a copy of its own per step."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    return AffineStaging().stage(AffineStep(batch, tokens), device)
