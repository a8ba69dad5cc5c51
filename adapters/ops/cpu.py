"""The LoRA operation on CPU: one kernel for single rows (decode), another for tiles of a segment (prefill).

Where the processor, the dtype or a shape does not suit the tile kernel, torch's matrix products serve the segments.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adapters.lora_batch import LoRABatch, Segment
from adapters.ops import cpu_kernels as kernels
from adapters.ops.interface import LoRAPools, RowTarget, check_tokens
from adapters.ops.row_writer import CPURowWriter
from adapters.ops.thread_team import KernelArguments, current_team

_KERNELS = {torch.bfloat16: kernels.add_bf16, torch.float32: kernels.add_f32}


class StagedBatch:
    """A step's batch, and where the kernels find it."""

    __slots__ = ("arguments", "batch")

    def __init__(self, batch: LoRABatch) -> None:
        self.batch = batch
        tiles = batch.tiles
        arrays = (batch.rows, batch.indptr, batch.starts, batch.weights)
        fields = (*(array.ctypes.data for array in arrays), len(batch.rows), *tiles.addresses)
        self.arguments = KernelArguments(np.array(fields, np.int64))

    def become(self, other: "StagedBatch") -> None:
        """Let recorded kernels, which read this one, read what `other` reads."""
        self.batch = other.batch  # held, since the kernels know addresses only
        self.arguments.fields[:] = other.arguments.fields


class CPULoRA:
    """One group's pools with the addresses the kernel reads, taken once because pools never move."""

    __slots__ = ("_arguments", "_fields", "_kernel", "_pools", "_ranks", "_run", "_tile_kernel", "_y_fields")

    def __init__(self, pools: LoRAPools) -> None:
        dtype = pools.a_pool.dtype
        if dtype not in _KERNELS:
            raise ValueError(f"LoRA pools of {dtype} cannot be served on CPU: load the base in bfloat16 or float32")
        self._pools = pools
        self._ranks = pools.ranks.numpy()  # [num_modules, R]
        self._kernel, self._run = _KERNELS[dtype].address, current_team().run
        self._fields = np.zeros(kernels.MODULES + pools.num_modules * kernels.MODULE, np.int64)
        self._arguments = KernelArguments(self._fields)
        self._fields[kernels.A_POOL : kernels.MODULES] = (
            pools.a_pool.data_ptr(),
            pools.ranks.data_ptr(),
            *pools.a_pool.shape,
            current_team().num_threads,
        )
        fits = kernels.tiles_fit(dtype is torch.bfloat16, pools.out_features)
        self._tile_kernel = kernels.add_tile_bf16.address if fits else None
        self._y_fields = slice(kernels.MODULES + kernels.Y, None, kernels.MODULE)
        self._fields[kernels.MODULES + kernels.B_POOL :: kernels.MODULE] = [b.data_ptr() for b in pools.b_pools]
        self._fields[kernels.MODULES + kernels.OUT_FEATURES :: kernels.MODULE] = pools.out_features

    def add(self, ys: Sequence[Tensor], x: Tensor, staged: StagedBatch) -> None:
        """y_m[t] += Σ_e weight_e · (x[t] · A_mᵀ) · B_m for the tokens that have entries; the rest keep their bits."""
        dtype, in_features, batch = self._pools.a_pool.dtype, self._pools.in_features, staged.batch
        check_tokens(ys, x, batch.num_tokens, self._pools)
        if x.dtype is not dtype or any(y.dtype is not dtype or not y.is_contiguous() for y in ys):
            raise RuntimeError(f"LoRA pools of {dtype} met x of {x.dtype} and y of {ys[0].dtype}; y must be contiguous")
        x_stride = in_features
        if not x.is_contiguous():
            x = _dense_rows(x)
            x_stride = x.stride(0)
        self._fields[: kernels.A_POOL] = (x.data_ptr(), x_stride, staged.arguments.address)
        self._fields[self._y_fields] = [y.data_ptr() for y in ys]
        # A decode step has a chunk for every row, so that it can be recorded for any mix of adapters.
        num_chunks = len(batch.rows) if batch.segments else batch.num_tokens
        if num_chunks:
            self._run(self._kernel, self._arguments, num_chunks)
        if batch.segments and self._tile_kernel is not None:
            self._run(self._tile_kernel, self._arguments, len(batch.tiles.where))
        elif batch.segments:
            x_rows = x.view(-1, in_features)
            for module, y in enumerate(ys):
                for segment in batch.segments:
                    self._add_segment(module, y.view(-1, y.shape[-1]), x_rows, segment)

    def _add_segment(self, module: int, y: Tensor, x: Tensor, segment: Segment) -> None:
        """y[begin:end] += weight · (x[begin:end] · Aᵀ) · B; the shrunk rows are rounded to x's dtype in between."""
        end = segment.start + int(self._ranks[module, segment.start])
        if end == segment.start:
            return
        shrunk = x[segment.begin : segment.end] @ self._pools.a_pool[module, segment.start : end].T  # [n, r]
        b_rows = self._pools.b_pools[module][segment.start : end]
        y[segment.begin : segment.end].addmm_(shrunk, b_rows, alpha=segment.weight)


def _dense_rows(x: Tensor) -> Tensor:
    """x as [num_tokens, in_features] with adjacent elements in a row; a copy only when its strides leave no view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def row_writer(targets: Sequence[RowTarget]) -> CPURowWriter:
    return CPURowWriter(targets)


def bind(pools: LoRAPools) -> CPULoRA:
    return CPULoRA(pools)


def stage(batch: LoRABatch) -> StagedBatch:
    return StagedBatch(batch)
