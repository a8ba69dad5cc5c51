"""What a LoRA operation is: pools bound once per group of modules, one call per forward. Each implementation is a file.

A group is the modules that read one input: q, k and v; gate and up; or one module alone. For token t of a step with the
entries e of its CSR row, and every module m of the group,
    y_m[t] += Σ_e weight_e · (x[t] · A_m[s_e : s_e + r]ᵀ) · B_m[s_e : s_e + r],   r = ranks[m, s_e],
accumulated in float32 and rounded once to y's dtype. Tokens without entries keep their bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from adapters.lora_batch import LoRABatch


@dataclass(frozen=True, eq=False)
class LoRAPools:
    """The pools of a group's modules. They never move; ranks[m, start] is the rank, in module m, of the adapter whose
    rows begin at `start`, 0 where it does not target m."""

    a_pool: Tensor  # [num_modules, R, in_features]
    b_pools: tuple[Tensor, ...]  # per module [R, out_features]
    ranks: Tensor  # int32 [num_modules, R]

    def __post_init__(self) -> None:
        num_modules, num_rows = self.a_pool.shape[:2]
        if len(self.b_pools) != num_modules or any(len(b_pool) != num_rows for b_pool in self.b_pools):
            raise ValueError(f"A of {tuple(self.a_pool.shape)} met B of {[tuple(b.shape) for b in self.b_pools]}")
        if self.ranks.dtype is not torch.int32 or self.ranks.shape != (num_modules, num_rows):
            raise ValueError(f"ranks are {self.ranks.dtype} {tuple(self.ranks.shape)}, not int32 for each pool row")
        tensors = (self.a_pool, self.ranks, *self.b_pools)
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError("LoRA pools and ranks must be contiguous")
        if any(b_pool.dtype is not self.a_pool.dtype for b_pool in self.b_pools):
            raise ValueError(f"A of {self.a_pool.dtype} met B of {[b_pool.dtype for b_pool in self.b_pools]}")

    @property
    def num_modules(self) -> int:
        return len(self.b_pools)

    @cached_property
    def in_features(self) -> int:
        return self.a_pool.shape[2]

    @cached_property
    def out_features(self) -> tuple[int, ...]:
        return tuple(b_pool.shape[1] for b_pool in self.b_pools)


class BoundLoRA(Protocol):
    """One group's pools, ready to be applied."""

    def add(self, ys: Sequence[Tensor], x: Tensor, batch: Any) -> None:
        """Add every token's delta to the outputs, in place; `batch` is what `stage` gave for this step.

        ys[m] [..., out_features] is contiguous, x [..., in_features] is not required to be; the leading dimensions
        of all flatten to the batch's number of tokens, else RuntimeError.
        """


@dataclass(frozen=True, slots=True, eq=False)
class RowTarget:
    """A matrix of an adapter [num_rows, features], which begins at element `begin` of its flat tensor, and its pool."""

    pool: Tensor  # [R, features]
    begin: int
    num_rows: int


class RowWriter(Protocol):
    """The matrices of all adapters of one layout, ready to be copied."""

    def write(self, flat: Tensor, start: int) -> None:
        """Rows [start, start + num_rows) of every target's pool := its matrix in `flat` [num_elements], converted to
        the pool's dtype."""


class LoRAOps(Protocol):
    """One implementation; a module with these functions is one."""

    def bind(self, pools: LoRAPools) -> BoundLoRA:
        """Prepare a group; ValueError for a dtype that is not served."""

    def stage(self, batch: LoRABatch) -> Any:
        """The batch as `add` takes it, made once per step for all groups."""

    def row_writer(self, targets: Sequence[RowTarget]) -> RowWriter:
        """Prepare to copy adapters of one layout into pools that never move."""


def check_tokens(ys: Sequence[Tensor], x: Tensor, num_tokens: int, pools: LoRAPools) -> None:
    """Raise unless x and every y hold num_tokens rows, so that no token is silently skipped or overrun."""
    fits = x.numel() == num_tokens * pools.in_features and len(ys) == pools.num_modules
    if not fits or any(y.numel() != num_tokens * out for y, out in zip(ys, pools.out_features, strict=True)):
        raise RuntimeError(
            f"LoRA batch of {num_tokens} tokens met x {tuple(x.shape)} and y {[tuple(y.shape) for y in ys]} of modules "
            f"{pools.in_features} -> {pools.out_features}: build the batch from the tokens of this forward pass"
        )
