"""The LoRA operation on CPU: one kernel for single rows (decode), another for tiles of a segment (prefill).

Where the processor, the dtype or a shape does not suit the tile kernel, torch's matrix products serve the segments.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adapters.lora_batch import LoRABatch, Segment
from adapters.ops import cpu_kernels as kernels
from adapters.ops.interface import LoRAPools, check_tokens
from adapters.ops.thread_team import current_team

_KERNELS = {torch.bfloat16: kernels.add_bf16.address, torch.float32: kernels.add_f32.address}


class CPULoRA:
    """One group's pools with the addresses the kernel reads, taken once because pools never move."""

    __slots__ = ("_address", "_fields", "_kernel", "_pools", "_ranks", "_run", "_tiles_fit", "_y_fields")

    def __init__(self, pools: LoRAPools) -> None:
        dtype = pools.a_pool.dtype
        if dtype not in _KERNELS:
            raise ValueError(f"LoRA pools of {dtype} cannot be served on CPU: load the base in bfloat16 or float32")
        self._pools = pools
        self._ranks = pools.ranks.numpy()  # [num_modules, R]
        self._kernel, self._run = _KERNELS[dtype], current_team().run
        self._fields = np.zeros(kernels.MODULES + pools.num_modules * kernels.MODULE, np.int64)
        self._fields[kernels.A_POOL : kernels.MODULES] = (
            pools.a_pool.data_ptr(),
            pools.ranks.data_ptr(),
            *pools.a_pool.shape,
        )
        self._address = self._fields.ctypes.data
        self._tiles_fit = kernels.tiles_fit(dtype is torch.bfloat16, pools.out_features)
        self._y_fields = slice(kernels.MODULES + kernels.Y, None, kernels.MODULE)
        self._fields[kernels.MODULES + kernels.B_POOL :: kernels.MODULE] = [b.data_ptr() for b in pools.b_pools]
        self._fields[kernels.MODULES + kernels.OUT_FEATURES :: kernels.MODULE] = pools.out_features

    def add(self, ys: Sequence[Tensor], x: Tensor, batch: LoRABatch) -> None:
        """y_m[t] += Σ_e weight_e · (x[t] · A_mᵀ) · B_m for the tokens that have entries; the rest keep their bits."""
        dtype, in_features = self._pools.a_pool.dtype, self._pools.in_features
        check_tokens(ys, x, batch.num_tokens, self._pools)
        if x.dtype is not dtype or any(y.dtype is not dtype or not y.is_contiguous() for y in ys):
            raise RuntimeError(f"LoRA pools of {dtype} met x of {x.dtype} and y of {ys[0].dtype}; y must be contiguous")
        x_stride = in_features
        if not x.is_contiguous():
            x = _dense_rows(x)
            x_stride = x.stride(0)
        if len(batch.rows):
            self._add_rows(ys, x, x_stride, batch)
        if batch.segments and self._tiles_fit:
            self._add_tiles(ys, x, x_stride, batch)
        elif batch.segments:
            x_rows = x.view(-1, in_features)
            for module, y in enumerate(ys):
                for segment in batch.segments:
                    self._add_segment(module, y.view(-1, y.shape[-1]), x_rows, segment)

    def _add_rows(self, ys: Sequence[Tensor], x: Tensor, x_stride: int, batch: LoRABatch) -> None:
        self._fields[: kernels.TILES] = (x.data_ptr(), x_stride, *batch.addresses)
        self._fields[self._y_fields] = [y.data_ptr() for y in ys]
        self._run(self._kernel, self._address, len(batch.rows))

    def _add_tiles(self, ys: Sequence[Tensor], x: Tensor, x_stride: int, batch: LoRABatch) -> None:
        fields, tiles = self._fields, batch.tiles
        fields[kernels.X], fields[kernels.X_STRIDE] = x.data_ptr(), x_stride
        fields[kernels.TILES], fields[kernels.TILE_WEIGHTS] = tiles.addresses
        fields[self._y_fields] = [y.data_ptr() for y in ys]
        self._run(kernels.add_tile_bf16.address, self._address, len(tiles.where))

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


def bind(pools: LoRAPools) -> CPULoRA:
    return CPULoRA(pools)


def stage(batch: LoRABatch) -> LoRABatch:
    return batch
