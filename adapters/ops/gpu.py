"""The LoRA operation on CUDA: two Triton launches for a whole group of modules, and more where a step has tiles.

Grids follow from the buffer's capacities alone, nothing is allocated and nothing read back, so `add` may be captured
into a graph and replayed over whatever `fill` has written since. All groups share the batch's workspace: they run one
after another on one stream. Knows neither adapters nor graphs.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from adapters.lora_batch import LoRABatch
from adapters.ops.gpu_batch import GPULoRABatch, LoRAStaging
from adapters.ops.gpu_blocks import BLOCK_M, BLOCK_R, MAX_MODULES, BlockSizes, block_sizes
from adapters.ops.gpu_kernels import expand_rows, shrink_rows
from adapters.ops.gpu_tile_kernels import expand_tiles, shrink_tiles
from adapters.ops.interface import LoRAPools, check_tokens
from adapters.ops.reference import row_writer as row_writer

MAX_STAGED_RANK = 256
"""Ranks that a batch staged by itself makes room for; what the server admits at most unless told otherwise."""

_DTYPES = (torch.bfloat16, torch.float32)


class GPULoRA:
    """One group's pools and the block sizes its shape asks for."""

    __slots__ = ("_blocks", "_first_blocks", "_pools")

    def __init__(self, pools: LoRAPools, blocks: BlockSizes | None = None) -> None:
        if pools.a_pool.dtype not in _DTYPES:
            raise ValueError(
                f"LoRA pools of {pools.a_pool.dtype} cannot be served on the GPU: "
                "load the base model in bfloat16 or float32"
            )
        if pools.num_modules > MAX_MODULES:
            raise ValueError(
                f"a group of {pools.num_modules} modules is over the {MAX_MODULES} of one launch: split it"
            )
        self._pools = pools
        element_size = pools.a_pool.element_size()
        self._blocks = blocks or block_sizes(pools.in_features, pools.out_features, element_size=element_size)
        # Block i of the row expand belongs to module m for first[m] <= i < first[m + 1], [num_modules + 1].
        num_blocks = [_num_blocks(out, self._blocks.row_block_n) for out in pools.out_features]
        self._first_blocks = tuple(accumulate(num_blocks, initial=0))

    def add(self, ys: Sequence[Tensor], x: Tensor, batch: GPULoRABatch) -> None:
        """y_m[t] += Σ_e weight_e · (x[t] · A_mᵀ) · B_m for the tokens that have entries; the rest keep their bits."""
        self._check(ys, x, batch)
        x_rows = x.reshape(-1, x.shape[-1])  # [num_tokens, in_features]
        if x_rows.stride(1) != 1:
            x_rows = x_rows.contiguous()
        y_rows = tuple(y.view(-1, y.shape[-1]) for y in ys)  # per module [num_tokens, out_features]
        if batch.caps.num_rows:
            self._add_rows(y_rows, x_rows, batch)
        if batch.caps.num_tiles:
            self._add_tiles(y_rows, x_rows, batch)

    def _check(self, ys: Sequence[Tensor], x: Tensor, batch: GPULoRABatch) -> None:
        check_tokens(ys, x, batch.caps.num_tokens, self._pools)
        dtype = self._pools.a_pool.dtype
        if x.dtype is not dtype or any(y.dtype is not dtype or not y.is_contiguous() for y in ys):
            raise RuntimeError(
                f"LoRA pools of {dtype} met x of {x.dtype} and y of {[y.dtype for y in ys]}; y must be contiguous"
            )

    def _add_rows(self, ys: tuple[Tensor, ...], x: Tensor, batch: GPULoRABatch) -> None:
        pools, split, block_n = self._pools, self._blocks.rows, self._blocks.row_block_n
        num_rows, first_blocks = batch.caps.num_rows, self._first_blocks
        constants = {"NUM_MODULES": pools.num_modules, "MAX_RANK": batch.caps.padded_rank, "SPLITS": split.count}
        step = (batch.row_tokens, batch.row_indptr, batch.entry_starts)
        shrink_rows[(num_rows, split.count, pools.num_modules)](
            *(batch.workspace, x, pools.a_pool, pools.ranks, *step, _row_stride(x), pools.a_pool.shape[1]),
            IN=pools.in_features,
            STEPS=split.steps,
            BLOCK_K=split.block_k,
            BLOCK_R=BLOCK_R,
            num_warps=4,
            **constants,
        )
        expand_rows[(num_rows, first_blocks[-1])](
            *(ys, pools.b_pools, batch.workspace, pools.ranks, *step, batch.entry_weights, pools.a_pool.shape[1]),
            OUTS=pools.out_features,
            FIRST_BLOCKS=first_blocks,
            SPLITS_PADDED=_power_of_2(split.count),
            BLOCK_N=block_n,
            BLOCK_R=BLOCK_R,
            num_warps=4,
            **constants,
        )

    def _add_tiles(self, ys: tuple[Tensor, ...], x: Tensor, batch: GPULoRABatch) -> None:
        pools, split, block_n = self._pools, self._blocks.tiles, self._blocks.tile_block_n
        num_tiles = batch.caps.num_tiles
        constants = {"NUM_MODULES": pools.num_modules, "MAX_RANK": batch.caps.padded_rank, "SPLITS": split.count}
        constants |= {"BLOCK_M": BLOCK_M, "BLOCK_R": BLOCK_R}
        step = (batch.tile_begins, batch.tile_lengths, batch.tile_starts)
        shrink_tiles[(num_tiles, split.count, pools.num_modules)](
            *(batch.workspace, x, pools.a_pool, pools.ranks, *step, _row_stride(x), pools.a_pool.shape[1]),
            IN=pools.in_features,
            STEPS=split.steps,
            BLOCK_K=split.block_k,
            num_warps=4,
            num_stages=3,
            **constants,
        )
        for module, (y, b_pool) in enumerate(zip(ys, pools.b_pools, strict=True)):
            expand_tiles[(num_tiles, _num_blocks(y.shape[1], block_n))](
                *(y, b_pool, batch.workspace, pools.ranks, *step, batch.tile_weights, pools.a_pool.shape[1], module),
                OUT=y.shape[1],
                BLOCK_N=block_n,
                num_warps=4,
                num_stages=2,
                **constants,
            )


def bind(pools: LoRAPools) -> GPULoRA:
    return GPULoRA(pools)


def stage(batch: LoRABatch, device: torch.device | None = None, *, max_rank: int = MAX_STAGED_RANK) -> GPULoRABatch:
    """The batch on `device` (the current CUDA device) at its own size: a copy and a workspace per step."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    return LoRAStaging(max_rank=max_rank).stage(batch, device)


def _num_blocks(out_features: int, block_n: int) -> int:
    return -(-out_features // block_n)


def _row_stride(x: Tensor) -> int:
    """x.stride(0), which of a single row may be anything and would compile the kernel anew."""
    return x.stride(0) if len(x) > 1 else x.shape[1]


def _power_of_2(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
