"""Linears whose weight lies in memory the way the CPU's matrix kernels read it, packed once at load.

A plain bfloat16 linear reorders its weight on every call, which for a handful of rows costs more than the product.
Where the processor has the instructions, a linear gets our own product (panel_linear.py); elsewhere oneDNN's packed
one, where it packs at all. float32 stays plain, to sum in the very order of the model's own forward. Either way a row
has the same bits whatever rows stand beside it. Knows nothing of LoRA.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.host_memory import HostMemory
from adapters.ops import bf16_dot
from adapters.ops.thread_team import ThreadTeam
from server.engine import panel_linear

logger = logging.getLogger(__name__)

_PACKED_FOR_ROWS = 16  # a hint to oneDNN; the packed weight serves any number of rows
_TOLERANCE = 2e-2  # of the largest output, bfloat16


class PackedLinear(nn.Linear):
    """A linear with an opaque weight packed by oneDNN: y = x · Wᵀ + b. Reading the weight by itself fails loudly."""

    _packed: Tensor  # opaque, of shape [out_features, in_features]

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.in_features:
            return _multiply(x, self._packed, self.bias)
        # oneDNN has kernels of its own for a single row, which round otherwise: a lone request would differ from
        # the same request in company.
        pair = x.reshape(1, self.in_features).expand(2, -1)
        return _multiply(pair, self._packed, self.bias)[:1].view(*x.shape[:-1], self.out_features)


@dataclass(frozen=True, slots=True)
class PackedCount:
    """How many linears were given which product."""

    panels: int
    onednn: int


def pack_linears(model: nn.Module, groups: Sequence[Sequence[str]], team: ThreadTeam) -> PackedCount:
    """Pack every plain nn.Linear of a model on the CPU. `groups` names linears that read one input. Weights used
    elsewhere are kept beside."""
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    kept = {id(module): uses[id(module.weight)] > 1 for module in model.modules() if type(module) is nn.Linear}
    panels = _pack_panels(model, groups, team, kept) if bf16_dot.is_supported() else 0
    return PackedCount(panels=panels, onednn=_pack_with_onednn(model, kept))


def _pack_panels(model: nn.Module, groups: Sequence[Sequence[str]], team: ThreadTeam, kept: dict[int, bool]) -> int:
    grouped = [[model.get_submodule(name) for name in names] for names in groups]
    members = {id(linear) for group in grouped for linear in group}
    alone = [[module] for module in model.modules() if id(module) not in members]
    memory, num_packed = HostMemory(), 0
    for group in [*grouped, *alone]:
        linears = [each for each in group if type(each) is nn.Linear and panel_linear.fits(each)]
        if linears and panel_linear.pack_group(
            linears, team, memory, keep_weights=[kept[id(each)] for each in linears]
        ):
            num_packed += len(linears)
    return num_packed


def _pack_with_onednn(model: nn.Module, kept: dict[int, bool]) -> int:
    linears = [module for module in model.modules() if type(module) is nn.Linear and module.weight.device.type == "cpu"]
    trusted: dict[tuple[int, int], bool] = {}
    num_packed = 0
    for linear in linears:
        key = (linear.in_features, linear.out_features)
        packed = _pack(linear) if trusted.get(key, True) else None
        if key not in trusted:
            trusted[key] = packed is not None and _agrees(linear, packed)
        if packed is not None and trusted[key]:
            _swap(linear, packed, keep_weight=kept[id(linear)])
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
