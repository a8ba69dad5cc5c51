"""Linears that read one input (q, k and v; gate and up) with their LoRA pools: one operation for all of them.

Knows nothing of adapters' names, row ranges or eviction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from adapters.class_swap import STATE
from adapters.group_extras import GroupExtras
from adapters.lora_step import Step
from adapters.ops import BoundLoRA, LoRAPools
from adapters.shared_result import SharedResult


class GroupLoRA:
    """The pools of the linears that read one input."""

    __slots__ = ("_bound", "_forwards", "extras", "outputs", "pools", "step", "targeted")

    def __init__(
        self,
        step: Step,
        pools: LoRAPools,
        bound: BoundLoRA,
        extras: GroupExtras,
        forwards: Sequence[Callable[[Tensor], Tensor]],
    ) -> None:
        self.step = step
        self.pools = pools
        self.targeted: dict[int, int] = {}  # first row → linears with a rank there; read without asking the device
        self.extras = extras
        self.outputs = SharedResult(self._compute)
        self._bound = bound
        self._forwards = forwards  # of each linear without LoRA

    def _compute(self, x: Tensor) -> Sequence[Tensor]:
        """Each linear's own output for x, as the step's extras have it, plus the step's deltas."""
        ys = [forward(x).contiguous() for forward in self._forwards]
        extras = self.step.extras
        if extras is not None and (self.extras.touched or self.step.everywhere):
            self.extras.apply(ys, x, extras)
        self._bound.add(ys, x, self.step.batch)
        return ys

    @property
    def is_used(self) -> bool:
        """Whether an adapter of the step may change these linears."""
        return (
            bool(self.targeted) or self.step.everywhere or (self.step.extras is not None and bool(self.extras.touched))
        )

    def clear(self, start: int) -> None:
        """No linear of the group has a rank at row `start` any more, as the pools' ranks will say, too."""
        self.targeted.pop(start, None)


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
        group, step = lora.group, lora.group.step
        if step.batch is None or not group.is_used:
            return lora.forward(x)
        return group.outputs.take(lora.index, x)
