"""Where each adapter version stands: in host memory, and this step perhaps in a row range of the device pools.

Joins the host cache (bytes), the row-range pool (integers) and the swapped layers (tensors) so that the three
cannot disagree. The scheduler pins what a step needs; the engine activates it before the forward pass.
"""

from collections.abc import Collection
from dataclasses import dataclass

from adapters.adapter_ref import AdapterUse, AdapterVersion
from adapters.applied_extras import AppliedExtras
from adapters.device_room import DeviceNeed
from adapters.errors import AdapterCapacity
from adapters.host_cache import HostCache
from adapters.lora_batch import RowRanges
from adapters.lora_layers import LoRALayers
from adapters.lora_model import LoRAModel
from adapters.row_range_pool import RowRangePool


@dataclass(frozen=True, slots=True)
class _Form:
    """What the layers make of an adapter when it is loaded."""

    need: DeviceNeed
    extras: AppliedExtras | None


class AdapterResidency:
    def __init__(self, host: HostCache, pool: RowRangePool, layers: LoRALayers) -> None:
        self.host = host
        self.pool = pool
        self.layers = layers
        self._forms: dict[AdapterVersion, _Form] = {}  # of those in host memory
        self.num_activations = 0  # copies of an adapter into the pools, also of those that moved

    @property
    def active_versions(self) -> tuple[AdapterVersion, ...]:
        """Versions with a row range in the device pools."""
        return self.pool.versions

    def load(self, model: LoRAModel) -> None:
        """Take a checked adapter into host memory; AdapterCapacity when it fits there or in the pools not at all."""
        need, room = self.layers.sizes.need_of(model), self.pool.room
        if need.num_rows > room.num_rows:
            raise AdapterCapacity(
                f"the adapter has rank {need.num_rows} and all pools together hold {room.num_rows} ranks; "
                "restart with a larger --lora-memory"
            )
        if room.max_extra_bytes is not None and need.num_extra_bytes > room.max_extra_bytes:
            raise AdapterCapacity(
                f"the adapter takes {need.num_extra_bytes} bytes of the device beside its pairs, over "
                f"lora_extras_memory={room.max_extra_bytes}; restart with a larger --lora-extras-memory"
            )
        if model.version not in self._forms:
            form = _Form(need, self.layers.applied(model))
            self.host.put(model)
            self._forms[model.version] = form

    def unload(self, version: AdapterVersion) -> None:
        """Forget a version everywhere. The caller holds that no request uses it any more."""
        self.host.drop(version)
        self._forms.pop(version, None)
        self._deactivate(version)

    def model(self, version: AdapterVersion) -> LoRAModel:
        """KeyError when the version is not in host memory: whoever holds a lease must find it."""
        model = self.host.get(version)
        if model is None:
            raise KeyError(f"adapter version {version} is not loaded")
        return model

    def begin_step(self, needed: Collection[AdapterVersion] = ()) -> None:
        """Forget the pins of the step before; `needed` is what waiting requests name."""
        self.pool.begin_step(needed)

    def count_use(self, uses: tuple[AdapterUse, ...]) -> None:
        """A request begins to use its adapters."""
        for use in uses:
            self.pool.count_use(use.version)

    def pin(self, uses: tuple[AdapterUse, ...]) -> bool:
        """Make every adapter of a request resident for this step; False when the device has no room left for them."""
        needs = ((use.version, self._form(use.version).need) for use in uses)
        return all(self.pool.pin(version, need.num_rows, need.num_extra_bytes) for version, need in needs)

    def activate(self) -> None:
        """Copy what was pinned but is not yet in the pools; after the last pin, before every forward pass."""
        for freed in self.pool.take_freed():  # first, so that what comes finds the memory of what left
            self.layers.clear(freed.start, freed.length)
        pending = self.pool.take_pending()
        try:
            for version, row_range in pending:
                self.layers.write(row_range.start, self.model(version), self._form(version).extras)
                self.num_activations += 1
        except BaseException:
            for version, _ in pending:  # a range that is held but not written would serve another adapter's numbers
                self._deactivate(version)
            raise

    def row_ranges(self, uses: tuple[AdapterUse, ...]) -> RowRanges:
        """The pool rows of an activated request's adapters; a weight of 0 costs nothing."""
        return tuple((self._start_of(use.version), use.weight) for use in uses if use.weight != 0.0)

    def _form(self, version: AdapterVersion) -> "_Form":
        """KeyError when the version is not in host memory."""
        self.model(version)
        return self._forms[version]

    def _start_of(self, version: AdapterVersion) -> int:
        """The seam where a row could meet another adapter's numbers: its range must be the one last written for it."""
        start = self.pool.range_of(version).start
        if self.layers.version_at(start) != version:
            raise RuntimeError(f"pool row {start} is not version {version}'s: activate after the last pin of a step")
        return start

    def _deactivate(self, version: AdapterVersion) -> None:
        freed = self.pool.drop(version)
        if freed is not None:
            self.layers.clear(freed.start, freed.length)

    def check_integrity(self) -> None:
        """Raise AssertionError unless host memory, row ranges and pools tell the same story."""
        self.host.check_integrity()
        self.pool.check_integrity()
        self.layers.check_integrity()
        strangers = [version for version in self.pool.versions if version not in self.host]
        assert not strangers, f"row ranges held by versions no longer in host memory: {strangers}"
        assert self._forms.keys() == set(self.host), "the layers' forms are not those of the adapters in host memory"
