"""Gated MLPs of stock models: silu(gate) · up in one kernel call, shared out among the thread team.

A module is swapped by its class, after its own forward and the kernel's way gave the same numbers; what agrees with
neither form is left alone. Knows nothing of adapters: gate, up and down are called as the stock forward calls them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters.ops.thread_team import KernelArguments, ThreadTeam
from server.engine import fused_mlp_kernels as kernels

_TRIAL_TOKENS = 7
_MAX_DIFFERENCE = 2.0**-6  # of an element: two steps of bfloat16, for two roundings
_MIN_EQUAL = 0.98  # share of elements
_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}

Combine = Callable[[Tensor, Tensor], Tensor]


class FusedMLP(nn.Module):
    """Stands before the stock class in the swapped class: down(silu(gate(x)) · up(x))."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    _combine: Combine

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self._combine(self.gate_proj(x), self.up_proj(x)))
        return y


def fuse_mlps(model: nn.Module, team: ThreadTeam) -> int:
    """Swap every gated SiLU MLP of a frozen bfloat16 model on the CPU that the kernel agrees with; returns how many."""
    combine = _combine_on(team)
    num_fused = 0
    for module in model.modules():
        if _looks_gated(module) and _agrees(module, combine):
            module.__dict__["_combine"] = combine
            stock: Any = type(module)  # to mypy a class of modules is not hashable
            module.__class__ = _fused_class(stock)
            num_fused += 1
    return num_fused


@cache
def _fused_class(stock: type[Any]) -> type[nn.Module]:
    return type(f"Fused{stock.__name__}", (FusedMLP, stock), {})


def _looks_gated(module: nn.Module) -> bool:
    """Whether the parts, and nothing else, are those of a gated MLP."""
    parts = dict(module.named_children())
    if set(parts) != _PARTS or isinstance(module, FusedMLP) or module._parameters or module._buffers:
        return False
    weights = list(module.parameters())
    return bool(weights) and all(w.dtype is torch.bfloat16 and w.device.type == "cpu" for w in weights)


def _agrees(module: nn.Module, combine: Combine) -> bool:
    """Whether the module's own forward is down(act(gate(x)) · up(x)), to the bit, and its activation the kernel's."""
    generator = torch.Generator().manual_seed(0)
    act, gate, up, down = (getattr(module, name) for name in ("act_fn", "gate_proj", "up_proj", "down_proj"))
    in_features = int(gate.in_features)
    x = torch.randn(1, _TRIAL_TOKENS, in_features, generator=generator).bfloat16()
    # The weights decide how far x reaches into the activation, so that is tried by itself, where forms differ.
    gates = torch.linspace(-12, 12, 4001).bfloat16()
    ups = torch.randn(4001, generator=generator).bfloat16()
    with torch.inference_mode():
        try:
            has_form = torch.equal(module.forward(x), down(act(gate(x)) * up(x)))
            stock, found = act(gates) * ups, combine(gates, ups)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # it is no MLP of one input
            return False
    is_near = bool(((found.float() - stock.float()).abs() <= _MAX_DIFFERENCE * stock.float().abs()).all())
    return has_form and is_near and float((found == stock).float().mean()) >= _MIN_EQUAL


def _combine_on(team: ThreadTeam) -> Combine:
    """silu(gate) · up, both of one shape, bfloat16; the product is rounded after silu was, as torch does."""
    arguments = KernelArguments(np.zeros(kernels.NUM_FIELDS, np.int64))

    def combine(gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        size = gate.numel()
        arguments.fields[:] = (out.data_ptr(), gate.data_ptr(), up.data_ptr(), size)
        team.run(kernels.silu_times.address, arguments, -(-size // kernels.CHUNK))
        return out

    return combine
