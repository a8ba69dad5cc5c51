"""What a LoRA operation is: pools bound once per module, one call per forward. The implementations stand beside this.

For token t of a step with the entries e of its CSR row,
    y[t] += Σ_e weight_e · (x[t] · a_pool[s_e : s_e + r_e]ᵀ) · b_pool[s_e : s_e + r_e],   r_e = ranks[s_e],
accumulated in float32 and rounded once to y's dtype. Tokens without entries keep their bits.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from adapters.lora_batch import LoRABatch


class BoundLoRA(Protocol):
    """One module's pools, ready to be applied."""

    def add(self, y: Tensor, x: Tensor, batch: LoRABatch) -> None:
        """Add every token's delta to y, in place. y [..., out_features] is contiguous, x [..., in_features] is not
        required to be; the leading dimensions of both flatten to batch.num_tokens, else RuntimeError.
        """


class LoRAOps(Protocol):
    """One implementation; a module with this function is one."""

    def bind(self, a_pool: Tensor, b_pool: Tensor, ranks: npt.NDArray[np.int32]) -> BoundLoRA:
        """Bind a_pool [R, in_features], b_pool [R, out_features] and ranks [R]; all three stay where they are.

        ranks[start] is the rank, in this module, of the adapter whose rows begin at `start`; 0 = not targeted.
        """


def check_tokens(y: Tensor, x: Tensor, batch: LoRABatch, in_features: int, out_features: int) -> None:
    """Raise unless x and y hold batch.num_tokens rows each, so that no token is silently skipped or overrun."""
    if x.numel() != batch.num_tokens * in_features or y.numel() != batch.num_tokens * out_features:
        raise RuntimeError(
            f"LoRA batch of {batch.num_tokens} tokens met x {tuple(x.shape)} and y {tuple(y.shape)} "
            f"of a module {in_features} -> {out_features}: build the batch from the tokens of this forward pass"
        )
