"""What an adapter takes of the device, and what there is of it: rows of the pools, and bytes beside them.

Only on a device with memory of its own are there such bytes: on the CPU, what an adapter has besides pairs is read
where it lies, in host memory, which is counted there. Numbers alone; knows no tensors and nobody's name.
"""

from collections.abc import Container
from dataclasses import dataclass

from adapters.lora_model import LoRAModel


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceNeed:
    """Of one adapter."""

    num_rows: int = 1  # of the pools
    num_extra_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRoom:
    """For the adapters of one step together; None = no limit."""

    num_rows: int
    max_loras: int | None = None
    max_extra_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class DeviceSizes:
    """How adapters are counted. `pooled` are the linears that have pools."""

    pooled: Container[str]
    has_own_memory: bool

    def need_of(self, model: LoRAModel) -> DeviceNeed:
        """Its widest rank in a module with pools, one at least, which stands for it; and all else that it has."""
        if all(name in self.pooled for name in model.modules):
            num_rows, num_extra_bytes = max(1, model.lora_rank), 0
        else:
            ranks = (weights.lora_rank for name, weights in model.modules.items() if name in self.pooled)
            num_rows = max([1, *ranks])
            num_extra_bytes = sum(each.num_bytes for name, each in model.modules.items() if name not in self.pooled)
        if not self.has_own_memory:
            return DeviceNeed(num_rows=num_rows)
        return DeviceNeed(num_rows=num_rows, num_extra_bytes=num_extra_bytes + model.extras.num_applied_bytes)
