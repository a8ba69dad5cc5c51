"""How each name stands at this moment, for the routes and the metrics: joins what the parts know, and keeps nothing."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterNotFound
from adapters.registry import AdapterInfo, AdapterRegistry
from adapters.untrusted_json import shown
from server.adapter_life_metrics import AdapterLifeSnapshot
from server.adapter_metrics import AdapterResidency, ResidencySnapshot
from server.engine.request import EngineStats
from server.lifecycle.adapter_description import AdapterDescription, AdapterState, AdapterTier, state_in
from server.lifecycle.adapter_loader import AdapterLoader
from server.lifecycle.catalogue_records import AdapterRecord
from server.lifecycle.directory import AdapterDirectory
from server.lifecycle.host_tier import HostTier

_PER_TURN = 64  # descriptions made before others have a turn of the event loop


class AdapterView:
    """`lora_rows` are the rows of the device pools, `max_loras` the limit of adapters per step (None = what the rows
    hold).
    """

    def __init__(
        self,
        directory: AdapterDirectory,
        registry: AdapterRegistry,
        loader: AdapterLoader,
        host: HostTier,
        stats: Callable[[], EngineStats],
        *,
        lora_rows: int,
        max_loras: int | None,
    ) -> None:
        self._directory = directory
        self._registry = registry
        self._loader = loader
        self._host = host
        self._stats = stats
        self._lora_rows = lora_rows
        self._max_loras = max_loras

    def describe(self, name: str) -> AdapterDescription:
        """Raises AdapterNotFound."""
        record = self._directory.records.get(name)
        if record is None:
            raise AdapterNotFound(f"no adapter is registered as {shown(name)!r}")
        return self._of_record(record, self._active())

    def list(self) -> Sequence[AdapterDescription]:
        """All names in alphabetical order, then the versions that drain."""
        active, records = self._active(), self._directory.records
        named = [self._of_record(records[name], active) for name in sorted(records)]
        return [*named, *self.draining()]

    async def each(self) -> AsyncIterator[AdapterDescription]:
        """As `list`, of thousands too: others have their turn meanwhile. What is gone by then is left out."""
        for at, name in enumerate(sorted(self._directory.records)):
            if at % _PER_TURN == 0:
                await asyncio.sleep(0)
                active = self._active()
            record = self._directory.records.get(name)
            if record is not None:
                yield self._of_record(record, active)
        for description in self.draining():
            yield description

    def draining(self) -> Sequence[AdapterDescription]:
        """The versions that drain, each with the name it lost last."""
        active = self._active()
        return [self._draining(info, active) for info in self._registry.draining()]

    def states(self) -> Counter[str]:
        """How many names, and draining versions, are in each state; at each scrape, so without describing them."""
        active, jobs = self._active(), self._loader.jobs
        states: Counter[str] = Counter()
        for name, record in self._directory.records.items():
            if record.version is None:
                states[AdapterDescription(record=record, job=jobs.get(name)).state.value] += 1
            else:
                states[state_in(self._tier(record.version, active)).value] += 1
        if draining := len(self._registry.draining()):
            states[AdapterState.DRAINING.value] = draining
        return states

    def life(self) -> AdapterLifeSnapshot:
        """How adapters moved so far, and where they are."""
        host, stats = self._host.counters, self._stats()
        return AdapterLifeSnapshot(
            states=self.states(),
            host_hits=host.hits,
            host_misses=host.misses,
            host_evictions=host.evictions,
            device_evictions=stats.num_device_evictions,
            activations=stats.num_activations,
            loads=host.loads,
            failed_loads=host.failed_loads,
            load_seconds=host.load_seconds,
            waits=host.waits,
            wait_seconds=host.wait_seconds,
            timeouts=host.timeouts,
            free_rows=stats.num_free_lora_rows,
        )

    def residency(self, updated_at: float) -> ResidencySnapshot:
        """Who is resident and in use, for the gauges; `updated_at` is Unix time of the engine's last step."""
        stats = self._stats()
        return ResidencySnapshot(
            adapters=[
                AdapterResidency(
                    name=info.ref.name,
                    version=info.ref.version,
                    lora_rank=info.ref.lora_rank,
                    is_registered=info.is_registered,
                    in_flight=info.leases > 0,
                    pinned=info.is_registered and self._directory.records[info.ref.name].pin,
                )
                for info in self._registry.list_versions(self._host)
            ],
            running_versions=frozenset(stats.running_versions),
            waiting_versions=frozenset(stats.waiting_versions),
            active_versions=frozenset(stats.active_versions),
            max_device_adapters=self._max_device_adapters(),
            updated_at=updated_at,
        )

    def _active(self) -> frozenset[str]:
        return frozenset(self._stats().active_versions)

    def _of_record(self, record: AdapterRecord, active: frozenset[str]) -> AdapterDescription:
        job, version = self._loader.jobs.get(record.name), record.version
        if version is None:
            return AdapterDescription(record=record, job=job)
        return AdapterDescription(
            record=record,
            known=self._directory.version(version),
            info=self._registry.describe(record.name),
            tier=self._tier(version, active),
            job=job,
        )

    def _draining(self, info: AdapterInfo, active: frozenset[str]) -> AdapterDescription:
        version = info.ref.version
        record = AdapterRecord(name=info.ref.name, source=info.ref.source, version=version)
        known = self._directory.version(version)
        return AdapterDescription(record=record, known=known, info=info, tier=self._tier(version, active))

    def _tier(self, version: AdapterVersion, active: frozenset[str]) -> AdapterTier:
        if version in self._host:
            return AdapterTier.DEVICE if version in active else AdapterTier.HOST
        return AdapterTier.DISK

    def _max_device_adapters(self) -> int:
        """`max_loras`, or how many adapters of the widest registered rank (16 while there is none) the rows hold."""
        if self._max_loras is not None:
            return self._max_loras
        return self._lora_rows // (self._registry.max_lora_rank or 16)
