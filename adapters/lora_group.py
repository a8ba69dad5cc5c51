"""Linears that read one input, with their LoRA pools: the first one the model calls computes for all of them.

Stock model code calls q, k and v one after the other with the same tensor. Computing the three deltas at the first
call and handing the rest over when asked makes one LoRA operation of three, without touching the model's code.
Knows nothing of adapters' names, row ranges or eviction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adapters.lora_model import LoRAWeights
from adapters.ops import BoundLoRA, LoRAPools

STATE = "loramux_lora"
"""The attribute of a swapped linear that holds its ModuleLoRA."""


@dataclass(slots=True)
class Step:
    """What the forward pass under way applies; None outside one and in a step of base rows only."""

    batch: Any = None  # as LoRAOps.stage gave it
    is_running: bool = False


class GroupLoRA:
    """The pools of the linears that read one input, and the outputs computed but not yet asked for."""

    __slots__ = ("_bound", "_forwards", "_input", "_outputs", "num_targeting", "pools", "step")

    def __init__(self, step: Step, pools: LoRAPools, bound: BoundLoRA, forwards: Sequence[Callable[[Tensor], Tensor]]):
        self.step = step
        self.pools = pools
        self.num_targeting = 0  # (adapter, module) pairs with a rank in this group
        self._bound = bound
        self._forwards = forwards  # of each linear without LoRA
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def output(self, index: int, x: Tensor) -> Tensor:
        """The output of linear `index` for x: its own, plus the step's deltas."""
        if self._input is not x or self._outputs[index] is None:
            self._compute(x)
        y = self._outputs[index]
        assert y is not None
        self._outputs[index] = None
        if index == len(self._outputs) - 1:
            self.forget()
        return y

    def _compute(self, x: Tensor) -> None:
        ys = [forward(x).contiguous() for forward in self._forwards]
        self._bound.add(ys, x, self.step.batch)
        self._input, self._outputs = x, [*ys]

    def forget(self) -> None:
        """Let go of the outputs nobody asked for."""
        self._input, self._outputs = None, []

    def write(self, index: int, start: int, weights: LoRAWeights) -> None:
        """Rows [start, start + r) of linear `index` := lora_a, lora_b."""
        end = start + weights.lora_rank
        self.pools.a_pool[index, start:end].copy_(weights.lora_a)
        self.pools.b_pools[index][start:end].copy_(weights.lora_b)
        self.pools.ranks[index, start] = weights.lora_rank
        self.num_targeting += weights.lora_rank > 0

    def clear(self, start: int) -> None:
        """No linear of the group has a rank at row `start` any more."""
        self.num_targeting -= int(self.pools.ranks[:, start].count_nonzero())
        self.pools.ranks[:, start] = 0


@dataclass(frozen=True, slots=True)
class ModuleLoRA:
    """Where one linear stands."""

    group: GroupLoRA
    index: int
    forward: Callable[[Tensor], Tensor]  # the linear's own, without LoRA


class LoRALinear(nn.Module):
    """Mixed in before a linear's own class: y = base(x), then y += the step's deltas."""

    def forward(self, x: Tensor) -> Tensor:
        lora: ModuleLoRA = self.__dict__[STATE]
        group = lora.group
        if group.step.batch is None or not group.num_targeting:
            return lora.forward(x)
        return group.output(lora.index, x)
