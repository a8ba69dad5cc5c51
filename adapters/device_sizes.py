"""How what an adapter takes of the device is counted (device_room.py). Knows the pools' names, and no pool."""

from collections.abc import Container
from dataclasses import dataclass

from adapters.device_room import DeviceNeed
from adapters.lora_model import LoRAModel


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
