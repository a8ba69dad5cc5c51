"""Linears whose weight lies in memory the way the CPU's matrix kernels read it, packed once at load by oneDNN.

A plain bfloat16 linear reorders its weight on every call, which for a handful of rows costs more than the product.
Packed ones were 1.15 to 1.75 times as fast at 1 to 32 rows, and every row has the same bits whatever rows stand
beside it. float32 stays plain, to sum in the very order of the model's own forward; so does everything on a
processor for which oneDNN cannot pack. Knows nothing of LoRA.
"""

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

logger = logging.getLogger(__name__)

_PACKED_FOR_ROWS = 16  # a hint to oneDNN; the packed weight serves any number of rows
_TOLERANCE = 2e-2  # of the largest output, bfloat16


class PackedLinear(nn.Linear):
    """A linear with an opaque packed weight: y = x · Wᵀ + b. Reading the weight by itself fails loudly."""

    _packed: Tensor  # opaque, of shape [out_features, in_features]

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.in_features:
            return _multiply(x, self._packed, self.bias)
        # oneDNN has kernels of its own for a single row, which round otherwise: a lone request would differ from
        # the same request in company.
        pair = x.reshape(1, self.in_features).expand(2, -1)
        return _multiply(pair, self._packed, self.bias)[:1].view(*x.shape[:-1], self.out_features)


def pack_linears(model: nn.Module) -> int:
    """Pack every plain nn.Linear of a model on the CPU; returns how many. Weights used elsewhere are kept beside."""
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    linears = [module for module in model.modules() if type(module) is nn.Linear and module.weight.device.type == "cpu"]
    trusted: dict[tuple[int, int], bool] = {}
    num_packed = 0
    for linear in linears:
        key = (linear.in_features, linear.out_features)
        packed = _pack(linear) if trusted.get(key, True) else None
        if key not in trusted:
            trusted[key] = packed is not None and _agrees(linear, packed)
        if packed is not None and trusted[key]:
            _swap(linear, packed, keep_weight=uses[id(linear.weight)] > 1)
            num_packed += 1
    return num_packed


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    # The overload by name: resolving it anew on each of some 200 calls a step costs as much as a small product.
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return product


def _pack(linear: nn.Linear) -> Tensor | None:
    if linear.weight.dtype is not torch.bfloat16:
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _PACKED_FOR_ROWS)
    except (AttributeError, RuntimeError) as error:
        logger.info("linears are not packed: %s", str(error).partition("\n")[0])
        return None
    return packed


def _agrees(linear: nn.Linear, packed: Tensor) -> bool:
    """Whether the packed weight gives the plain product, tried once per shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, linear.in_features, generator=generator).to(linear.weight.dtype)
    with torch.inference_mode():
        plain = functional.linear(x, linear.weight, linear.bias)
        found = _multiply(x, packed, linear.bias)
    error = float((found - plain).abs().max())
    return error <= _TOLERANCE * float(plain.abs().max())


def _swap(linear: nn.Linear, packed: Tensor, *, keep_weight: bool) -> None:
    state: dict[str, Any] = linear.__dict__
    state["_packed"] = packed
    if not keep_weight:
        linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.__class__ = PackedLinear
