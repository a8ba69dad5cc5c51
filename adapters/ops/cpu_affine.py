"""The affine operation on CPU: one kernel call a group, the tokens that need it shared out among the threads."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adapters.extras_batch import IntArray32
from adapters.lora_batch import LoRABatch
from adapters.ops import cpu_affine_kernels as kernels
from adapters.ops.affine_interface import AffineTable, rows_a_token
from adapters.ops.thread_team import KernelArguments, current_team

_KERNELS = {torch.bfloat16: kernels.affine_bf16, torch.float32: kernels.affine_f32}
_CHUNK = 4096  # elements a chunk has, at least, when there are as many


class StagedAffine:
    """A step's tokens, and where the kernel finds them."""

    __slots__ = ("_held", "arguments", "is_decode", "num_affine", "num_tokens")

    def __init__(self, batch: LoRABatch, tokens: IntArray32) -> None:
        self._held = batch, tokens
        self.num_tokens, self.num_affine, self.is_decode = batch.num_tokens, len(tokens), not batch.segments
        arrays = (batch.indptr, batch.starts, batch.weights)
        fields = (tokens.ctypes.data, len(tokens), *(array.ctypes.data for array in arrays))
        self.arguments = KernelArguments(np.array(fields, np.int64))

    def become(self, other: "StagedAffine") -> None:
        """Let recorded kernels, which read this one, read what `other` reads."""
        self._held, self.num_affine = other._held, other.num_affine
        self.arguments.fields[:] = other.arguments.fields


class CPUAffine:
    """One group's sites with the addresses the kernel reads."""

    __slots__ = ("_arguments", "_fields", "_run", "_table", "_tokens_per_chunk", "_widths")

    def __init__(self, table: AffineTable, sites: Sequence[int], widths: Sequence[int]) -> None:
        self._table = table  # its addresses never move
        self._widths = tuple(widths)
        self._run = current_team().run
        self._tokens_per_chunk = max(1, _CHUNK // sum(widths))
        self._fields = np.zeros(kernels.MODULES + len(sites) * kernels.MODULE, np.int64)
        self._fields[kernels.NUM_MODULES] = len(sites)
        self._fields[kernels.TOKENS_PER_CHUNK] = self._tokens_per_chunk
        self._fields[kernels.MAX_WIDTH] = max(widths)
        modules = self._fields[kernels.MODULES :].reshape(-1, kernels.MODULE)  # [num_modules, MODULE], a view
        modules[:, kernels.TABLE] = [table.addresses[site].data_ptr() for site in sites]
        modules[:, kernels.WIDTH] = widths
        self._arguments = KernelArguments(self._fields)

    def apply(self, ys: Sequence[Tensor], staged: StagedAffine) -> None:
        """y_m[t] = y_m[t] ⊙ (1 + Σ_e weight_e · d_e) + Σ_e weight_e · c_e for the tokens that have vectors."""
        kernel = _KERNELS.get(ys[0].dtype)
        if kernel is None or any(y.dtype is not ys[0].dtype for y in ys):
            raise RuntimeError(
                f"affine vectors met outputs of {[y.dtype for y in ys]}: float32 and bfloat16 are served"
            )
        modules = self._fields[kernels.MODULES :].reshape(-1, kernels.MODULE)
        modules[:, kernels.Y] = [y.data_ptr() for y in ys]
        modules[:, kernels.ROWS] = [
            rows_a_token(y, width, staged.num_tokens) for y, width in zip(ys, self._widths, strict=True)
        ]
        self._fields[kernels.STEP] = staged.arguments.address
        # A decode step has chunks for every row, so that it can be recorded for any mix of adapters.
        num_tokens = staged.num_tokens if staged.is_decode else staged.num_affine
        self._run(kernel.address, self._arguments, -(-num_tokens // self._tokens_per_chunk))


def bind_affine(table: AffineTable, sites: Sequence[int], widths: Sequence[int]) -> CPUAffine:
    return CPUAffine(table, sites, widths)


def stage_affine(batch: LoRABatch, tokens: IntArray32) -> StagedAffine:
    return StagedAffine(batch, tokens)
