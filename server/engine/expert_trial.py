"""Whether two ways to compute a module's fused experts give the same numbers. Knows neither."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest output
_NUM_TOKENS = 14

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [num_tokens, hidden], experts and their weights [num_tokens, k] → [num_tokens, hidden]."""


def agree(module: nn.Module, left: Compute, right: Compute) -> bool:
    """Tried on tokens of which an expert has several and another none, with weights that do not add up to one."""
    own: Any = module
    num_experts, hidden = len(own.gate_up_proj), own.down_proj.shape[2 if own.is_transposed else 1]
    weight = own.down_proj
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_NUM_TOKENS, hidden, generator=generator).to(weight.device, weight.dtype)
    num_slots, chosen = min(2, num_experts), max(1, num_experts - 1)
    drawn = torch.rand(_NUM_TOKENS, num_experts, generator=generator)
    drawn[:, chosen:] = -1.0  # the last expert has none
    index = drawn.topk(num_slots).indices.to(weight.device)
    weights = torch.rand(_NUM_TOKENS, num_slots, generator=generator).to(weight.device, weight.dtype)
    with torch.inference_mode():
        wanted, found = left(x, index, weights).float(), right(x, index, weights).float()
    error, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    return error <= _TOLERANCE[weight.dtype] * size
