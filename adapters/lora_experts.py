"""Fused experts with low-rank pairs: tokens of adapters that have such pairs are computed once more, with them.

y_e = gate(x · W_eᵀ + Σ_k w_k (x · a_k[e]ᵀ) · b_k[e]) and likewise down, weighted and summed over a token's experts.
Routing is not touched. Knows nothing of requests or of who has which adapter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.adapter_extras import ExpertPair, ExpertPairs


def experts_with_pairs(
    experts: nn.Module,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    parts: Sequence[tuple[float, ExpertPairs]],
) -> Tensor:
    """The output [n, hidden] of transformers' fused `experts` for tokens x [n, hidden] that all have the same adapters,
    each with its weight. `top_k_index`, `top_k_weights` [n, k] as the router gave them.

    Experts are added in ascending order, as transformers' own loop does.
    """
    module: Any = experts
    out = torch.zeros_like(x)
    for expert in top_k_index.unique().tolist():
        if expert >= module.gate_up_proj.shape[0]:  # what marks a slot without an expert
            continue
        tokens, slots = torch.where(top_k_index == expert)
        h = _product(module, "gate_up_proj", expert, x[tokens], [(w, pairs.gate_up) for w, pairs in parts])
        h = _product(module, "down_proj", expert, module._apply_gate(h), [(w, pairs.down) for w, pairs in parts])
        out.index_add_(0, tokens, (h * top_k_weights[tokens, slots, None]).to(out.dtype))
    return out


def _product(
    module: Any, parameter: str, expert: int, x: Tensor, pairs: Sequence[tuple[float, ExpertPair | None]]
) -> Tensor:
    weight = getattr(module, parameter)[expert]  # [out, in], or [in, out] where stored transposed
    y = x @ weight if module.is_transposed else nn.functional.linear(x, weight)
    if module.has_bias:
        y = y + getattr(module, f"{parameter}_bias")[expert]
    for adapter_weight, pair in pairs:
        if pair is not None:
            low = x @ pair.a[expert].to(x.dtype).T  # [n, r]
            y = torch.addmm(y, low, pair.b[expert].to(x.dtype), alpha=adapter_weight)
    return y
