"""Loaded adapters in host memory by version, within a budget of bytes. Owned by the engine thread, no locks.

It never evicts: what is registered must stay loadable onto the device, so a full cache refuses instead. Knows nothing
of names, leases or devices.
"""

from collections.abc import Iterator

from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterCapacity
from adapters.lora_model import LoRAModel


class HostCache:
    """version → LoRAModel. `max_adapters` None = as many as the bytes hold."""

    def __init__(self, max_bytes: int, max_adapters: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.max_adapters = max_adapters
        self._models: dict[AdapterVersion, LoRAModel] = {}
        self._num_bytes = 0

    def put(self, model: LoRAModel) -> None:
        """Keep a model; a version that is there already is left as it is. Raises AdapterCapacity, keeping nothing."""
        if model.version in self._models:
            return
        if self._num_bytes + model.num_bytes > self.max_bytes:
            raise AdapterCapacity(
                f"the adapter takes {model.num_bytes} bytes of host memory and {self.max_bytes - self._num_bytes} of "
                f"cpu_lora_memory={self.max_bytes} are free; unload one, or restart with a larger --cpu-lora-memory"
            )
        if self.max_adapters is not None and len(self._models) >= self.max_adapters:
            raise AdapterCapacity(
                f"{len(self._models)} adapters are loaded, which is max_cpu_loras={self.max_adapters}; unload one, or "
                "restart with a larger --max-cpu-loras"
            )
        self._models[model.version] = model
        self._num_bytes += model.num_bytes

    def get(self, version: AdapterVersion) -> LoRAModel | None:
        return self._models.get(version)

    def drop(self, version: AdapterVersion) -> bool:
        """Forget a version; False when it was not there."""
        model = self._models.pop(version, None)
        if model is None:
            return False
        self._num_bytes -= model.num_bytes
        return True

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __contains__(self, version: object) -> bool:
        return version in self._models

    def __len__(self) -> int:
        return len(self._models)

    def __iter__(self) -> Iterator[AdapterVersion]:
        return iter(self._models)

    def check_integrity(self) -> None:
        """Raises AssertionError when the byte count, the limits or the keys are not what they must be."""
        assert self._num_bytes == sum(model.num_bytes for model in self._models.values())
        assert self._num_bytes <= self.max_bytes
        assert self.max_adapters is None or len(self._models) <= self.max_adapters
        assert all(model.version == version for version, model in self._models.items())
