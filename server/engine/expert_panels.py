"""Products of fused experts by our own kernel, on weights packed once at load. Knows no routing and no adapters."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters.expert_groups import ExpertGroups
from adapters.host_memory import HostMemory
from adapters.lora_experts import FusedExperts, bind_experts, bound_experts
from adapters.ops.bf16_tile import WIDTH
from adapters.ops.thread_team import KernelArguments, ThreadTeam
from server.engine import expert_kernels as kernels
from server.engine.expert_trial import agree

_ALIASED, _LINE = 2048, 64  # bytes
_PER_STEP = {torch.bfloat16: 2, torch.float32: 1}  # inputs that are multiplied at once


class PanelExperts:
    """Satisfies `adapters.lora_experts.ExpertProduct` for weights [E, out, in] with `bias` [E, out] or none."""

    def __init__(self, weight: Tensor, bias: Tensor | None, team: ThreadTeam, memory: HostMemory) -> None:
        self._team, self._dtype = team, weight.dtype
        self._kernel = kernels.product_float32 if weight.dtype is torch.float32 else kernels.product_bfloat16
        num_experts, self._out_features, self._in_features = weight.shape
        self.weight = _pack(weight, memory)  # [E, panels, steps, WIDTH, inputs per step]
        num_panels, num_steps = self.weight.shape[1:3]
        self._width = num_panels * WIDTH
        self._bias = torch.zeros(1 if bias is None else num_experts, self._width)  # float32
        if bias is not None:
            self._bias[:, : self._out_features] = bias.float()
        self._chunks_per_group = -(-num_panels // kernels.PANELS_PER_CHUNK)
        self._arguments = KernelArguments(np.zeros(kernels.NUM_FIELDS, np.int64))
        fields = self._arguments.fields
        fields[kernels.Y_STRIDE] = self._width * self._dtype.itemsize
        fields[[kernels.WEIGHT, kernels.BIAS]] = self.weight.data_ptr(), self._bias.data_ptr()
        fields[kernels.BIAS_STRIDE] = 0 if bias is None else 4 * self._width
        fields[[kernels.NUM_STEPS, kernels.NUM_PANELS]] = num_steps, num_panels

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether [E, out, in] has a type and a shape that the kernel serves."""
        per_step = _PER_STEP.get(weight.dtype)
        return per_step is not None and weight.device.type == "cpu" and weight.shape[2] % per_step == 0

    def __call__(self, x: Tensor, groups: ExpertGroups) -> Tensor:
        """x [num_rows, in], by expert → [num_rows, out]."""
        if x.dtype is not self._dtype or x.shape[1] != self._in_features:
            raise RuntimeError(f"x is {x.dtype} {tuple(x.shape)}, not {self._dtype} of {self._in_features} features")
        x, rows = _spread(x), np.ascontiguousarray(groups.groups)
        y = x.new_empty(len(x), self._width)
        fields = self._arguments.fields
        fields[kernels.X_STRIDE] = x.stride(0) * self._dtype.itemsize
        fields[[kernels.X, kernels.Y, kernels.GROUPS]] = x.data_ptr(), y.data_ptr(), rows.ctypes.data
        with self._team.step():  # nothing inside another, as in a model whose every product is ours
            self._team.run(self._kernel.address, self._arguments, len(rows) * self._chunks_per_group)
        return y[:, : self._out_features]


def pack_experts(model: nn.Module, team: ThreadTeam) -> int:
    """Let the experts that are computed here be multiplied by the kernel, where it agrees; returns how many."""
    memory, num_packed = HostMemory(), 0
    for module in model.modules():
        bound = bound_experts(module)
        if bound is not None and _pack_module(module, bound, team, memory):
            num_packed += 1
    return num_packed


def _pack_module(module: nn.Module, bound: FusedExperts, team: ThreadTeam, memory: HostMemory) -> bool:
    own: Any = module
    packed: list[PanelExperts] = []
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(own, name).detach()
        weight = weight.transpose(1, 2) if own.is_transposed else weight  # [E, out, in]
        if not PanelExperts.fits(weight):
            return False
        packed.append(PanelExperts(weight, getattr(own, f"{name}_bias") if own.has_bias else None, team, memory))
    gate_up, down = packed
    fused = FusedExperts(module, gate_up, down)
    if not agree(module, bound.run, fused.run):
        return False
    bind_experts(module, fused)
    own.gate_up_proj = nn.Parameter(gate_up.weight, requires_grad=False)
    own.down_proj = nn.Parameter(down.weight, requires_grad=False)
    return True


def _spread(x: Tensor) -> Tensor:
    """x [num_rows, in] with rows that do not lie a multiple of 2 KiB apart: the first cache keeps only eight lines of
    such places, and the kernel reads twelve rows side by side."""
    num_rows, in_features = x.shape
    if num_rows == 1 or in_features * x.element_size() % _ALIASED:
        return x.contiguous()
    spread = x.new_empty(num_rows, in_features + _LINE // x.element_size())
    spread[:, :in_features] = x
    return spread[:, :in_features]


def _pack(weight: Tensor, memory: HostMemory) -> Tensor:
    """[E, out, in] → [E, out / 32, in / n, 32, n], the outputs filled up with zeros: for each n inputs that are
    multiplied at once, those of a panel's weights side by side."""
    (num_experts, out_features, in_features), per_step = weight.shape, _PER_STEP[weight.dtype]
    num_panels, num_steps = -(-out_features // WIDTH), in_features // per_step
    packed = memory.empty(num_experts, num_panels, num_steps, WIDTH, per_step, dtype=weight.dtype)  # of zeros
    for expert in range(num_experts):  # one at a time: the filled up copy is small
        filled = weight.new_zeros(num_panels * WIDTH, in_features)
        filled[:out_features] = weight[expert]
        packed[expert] = filled.view(num_panels, WIDTH, num_steps, per_step).permute(0, 2, 1, 3)
    return packed
