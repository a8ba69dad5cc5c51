"""The LoRA operation in plain torch, one token and one entry at a time: slow, obvious, any device; the oracle."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.lora_batch import LoRABatch
from adapters.ops.interface import check_tokens


@dataclass(frozen=True, slots=True)
class ReferenceLoRA:
    """One module's pools."""

    a_pool: Tensor  # [R, in_features]
    b_pool: Tensor  # [R, out_features]
    ranks: npt.NDArray[np.int32]  # [R]

    def add(self, y: Tensor, x: Tensor, batch: LoRABatch) -> None:
        """y[t] += Σ_e weight_e · (x[t] · Aᵀ) · B for the tokens that have entries."""
        in_features, out_features = self.a_pool.shape[1], self.b_pool.shape[1]
        check_tokens(y, x, batch, in_features, out_features)
        x_rows = x.reshape(-1, in_features)  # [num_tokens, in_features]
        y_rows = y.view(-1, out_features)  # [num_tokens, out_features]
        for t in range(batch.num_tokens):
            entries = range(int(batch.indptr[t]), int(batch.indptr[t + 1]))
            if any(self.ranks[batch.starts[e]] for e in entries):
                delta = sum((self._delta(x_rows[t], batch, e) for e in entries), torch.zeros((), device=y.device))
                y_rows[t] = (y_rows[t].float() + delta).to(y.dtype)

    def _delta(self, x_row: Tensor, batch: LoRABatch, entry: int) -> Tensor:
        """weight · (x · Aᵀ) · B in float32, [out_features]."""
        start = int(batch.starts[entry])
        end = start + int(self.ranks[start])
        shrunk = x_row.float() @ self.a_pool[start:end].float().T  # [r]
        return float(batch.weights[entry]) * (shrunk @ self.b_pool[start:end].float())


def bind(a_pool: Tensor, b_pool: Tensor, ranks: npt.NDArray[np.int32]) -> ReferenceLoRA:
    return ReferenceLoRA(a_pool, b_pool, ranks)
