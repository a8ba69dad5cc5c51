"""The LoRA operation in plain torch, one token and one entry at a time: slow, obvious, any device; the oracle."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.lora_batch import LoRABatch
from adapters.ops.interface import LoRAPools, RowTarget, check_tokens


@dataclass(frozen=True, slots=True)
class ReferenceLoRA:
    """One group's pools."""

    pools: LoRAPools

    def add(self, ys: Sequence[Tensor], x: Tensor, batch: LoRABatch) -> None:
        """y_m[t] += Σ_e weight_e · (x[t] · A_mᵀ) · B_m for the tokens that have entries."""
        check_tokens(ys, x, batch.num_tokens, self.pools)
        x_rows = x.reshape(batch.num_tokens, -1)  # [num_tokens, in_features]
        for module, y in enumerate(ys):
            y_rows = y.view(batch.num_tokens, -1)  # [num_tokens, out_features]
            for t in range(batch.num_tokens):
                entries = range(int(batch.indptr[t]), int(batch.indptr[t + 1]))
                if any(self.pools.ranks[module, batch.starts[e]] for e in entries):
                    deltas = torch.stack([self._delta(module, x_rows[t], batch, e) for e in entries])
                    y_rows[t] = (y_rows[t].float() + deltas.sum(0)).to(y.dtype)

    def _delta(self, module: int, x_row: Tensor, batch: LoRABatch, entry: int) -> Tensor:
        """weight · (x · Aᵀ) · B in float32, [out_features]."""
        start = int(batch.starts[entry])
        end = start + int(self.pools.ranks[module, start])
        shrunk = x_row.float() @ self.pools.a_pool[module, start:end].float().T  # [r]
        return float(batch.weights[entry]) * (shrunk @ self.pools.b_pools[module][start:end].float())


@dataclass(frozen=True, slots=True)
class ReferenceRowWriter:
    """One copy a matrix, after the whole adapter has come to the pools' device in one."""

    targets: Sequence[RowTarget]

    def write(self, flat: Tensor, start: int) -> None:
        for target in self.targets:
            flat = flat.to(target.pool.device)
            rows = target.pool[start : start + target.num_rows]  # [num_rows, features]
            rows.copy_(flat[target.begin : target.begin + rows.numel()].view_as(rows))


def row_writer(targets: Sequence[RowTarget]) -> ReferenceRowWriter:
    return ReferenceRowWriter(targets)


def bind(pools: LoRAPools) -> ReferenceLoRA:
    return ReferenceLoRA(pools)


def stage(batch: LoRABatch) -> LoRABatch:
    return batch
