"""The adapters of one server: names to leases, and every change of a name. Joins the parts of this package.

Durable records are the directory's, loads the loader's, what is in memory the host tier's, what leaves it the keeper's,
and who uses what the registry's. Lives on the event loop; knows no HTTP and no tensors.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from adapters.adapter_facts import AdapterFacts
from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterError
from adapters.lora_model import LoRAModel
from adapters.registry import AdapterRegistry
from adapters.version_store import VersionStore
from server.config import LoRALimits
from server.engine.request import EngineStats
from server.errors import ServerError, Unavailable
from server.lifecycle.adapter_events import AdapterEvents
from server.lifecycle.adapter_leases import AdapterLeases
from server.lifecycle.adapter_loader import AdapterLoader
from server.lifecycle.adapter_view import AdapterView
from server.lifecycle.alias_service import AliasService
from server.lifecycle.catalogue import Catalogue
from server.lifecycle.control import WantedAdapter
from server.lifecycle.device_watch import DeviceWatch
from server.lifecycle.directory import AdapterDirectory
from server.lifecycle.ensure_all import EnsureAll
from server.lifecycle.expiry import is_over, sweep_forever
from server.lifecycle.following import follow
from server.lifecycle.host_tier import HostTier
from server.lifecycle.host_traffic import ReadVersion
from server.lifecycle.load_job import AdapterLoad, LoadJob
from server.lifecycle.model_names import ModelNames
from server.lifecycle.name_changes import NameChanges
from server.lifecycle.reconciler_control import ReconcilerControl
from server.lifecycle.source_reader import ReadAdapter, SourceReader
from server.lifecycle.sources.source_template import SourceTemplate
from server.lifecycle.sources.sources import Sources
from server.lifecycle.sources.upload_store import UploadStore
from server.lifecycle.stored_versions import StoredVersions
from server.lifecycle.unloading import Unloaded, Unloading
from server.lifecycle.unused_uploads import sweep_uploads
from server.lifecycle.unused_versions import sweep_versions
from server.lifecycle.version_keeper import VersionKeeper
from server.lifecycle.version_locks import VersionLocks
from server.lifecycle.waiting_for_names import WaitingForNames
from server.metrics import Metrics

logger = logging.getLogger(__name__)


class AdapterEngine(Protocol):
    """What this package asks of `server.async_engine.AsyncEngine`."""

    @property
    def stats(self) -> EngineStats: ...
    @property
    def facts(self) -> Mapping[AdapterVersion, AdapterFacts]: ...
    @property
    def is_healthy(self) -> bool: ...
    def load_adapter(self, model: LoRAModel) -> Awaitable[None]: ...
    def unload_adapter(self, version: AdapterVersion) -> Awaitable[None]: ...


class AdapterService(AdapterLeases, ReconcilerControl):
    """`base_names` are the served names of the base model, `row_bytes` what one rank takes in the device's pools,
    `cold_timeout` how many seconds a request waits for an adapter that is not in memory, `keep_versions` how many
    replaced versions a name keeps on disk, `server_id` what it is known as after a restart."""

    def __init__(
        self,
        engine: AdapterEngine,
        read: ReadAdapter,
        metrics: Metrics,
        *,
        catalogue: Catalogue,
        store: VersionStore,
        sources: Sources,
        base_names: Sequence[str],
        limits: LoRALimits,
        row_bytes: int = 0,
        keep_versions: int = 2,
        cold_timeout: float = 30.0,
        template: SourceTemplate | None = None,
        uploads: UploadStore | None = None,
        lora_rows: int = 0,
        server_id: str = "",
    ) -> None:
        self.started_at = time.time()  # seconds since the epoch
        self.engine = engine
        self.store = store
        self._metrics = metrics
        self.cold_timeout = cold_timeout
        self._server_id = server_id
        self.events = AdapterEvents()
        self.registry = AdapterRegistry(
            reserved_names=base_names, on_unused=lambda v: self.keeper.review(v), on_released=self._on_released
        )
        self.directory = AdapterDirectory(catalogue, self.registry, self._on_record)
        locks, reader = VersionLocks(), SourceReader(sources, read)
        self.host = self._host_tier(StoredVersions(store, reader, self.directory).read, limits)
        self.together = EnsureAll(self.host)
        self.loader = self._adapter_loader(reader, locks, keep_versions)
        self.device = DeviceWatch(engine, row_bytes=row_bytes, on_change=self._on_version)
        self.keeper = self._version_keeper(locks)
        self.aliases = AliasService(self.directory, self.registry, self.loader)
        self.names = ModelNames(base_names, self.registry, self.directory.aliases)
        self.changes = NameChanges(self.directory, self.registry, self.loader, self.host)
        self._unloading = Unloading(self.directory, self.registry, self.loader, self.keeper)
        self.misses = WaitingForNames(
            self.loader, self.directory.records, template, check_name=self.check_name, timeout=cold_timeout
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._has_started = False
        self._uploads = uploads
        self.view = self._view(lora_rows, limits.max_loras)
        metrics.watch_adapters(lambda: self.view.residency(metrics.last_step_at))
        metrics.watch_adapter_life(self.view.life)

    def _host_tier(self, read: ReadVersion, limits: LoRALimits) -> HostTier:
        return HostTier(
            self.engine,
            read,
            num_leases=self.registry.num_leases,
            max_bytes=limits.cpu_lora_memory,
            max_adapters=limits.max_cpu_loras,
            on_change=self._on_version,
        )

    def _adapter_loader(self, reader: SourceReader, locks: VersionLocks, keep_versions: int) -> AdapterLoader:
        return AdapterLoader(
            self.directory,
            reader,
            self.store,
            self.host,
            self._metrics,
            locks,
            keep_versions=keep_versions,
            server_id=self._server_id,
            events=self.events,
            on_dropped=self._settle,
        )

    def _version_keeper(self, locks: VersionLocks) -> VersionKeeper:
        return VersionKeeper(
            self.registry,
            self.directory.is_wanted,
            self.host,
            self.store,
            locks,
            device_bytes_of=self.device.num_bytes,
            refresh=self.directory.refresh,
        )

    def _view(self, lora_rows: int, max_loras: int | None) -> AdapterView:
        return AdapterView(
            self.directory,
            self.registry,
            self.loader,
            self.host,
            lambda: self.engine.stats,
            lora_rows=lora_rows,
            max_loras=max_loras,
        )

    async def start(self) -> None:
        """Take over what the catalogue holds; loads it says were acknowledged go on. Raises CatalogueError."""
        await self.directory.start()
        self._has_started = True
        self.changes.follow_policies()
        for record in tuple(self.directory.records.values()):
            self.loader.resume(record, also_foreign=True)
        chores: list[Coroutine[object, object, None]] = [
            follow(self.directory),
            sweep_forever(self.directory.records, self._expire),
            sweep_versions(self.store.versions, self.registry.is_held, self.keeper.review),
        ]
        if self._uploads is not None:
            chores.append(sweep_uploads(self._uploads, lambda: self.directory.sources() | self.loader.sources()))
        self._tasks = [asyncio.create_task(chore) for chore in chores]

    async def close(self) -> None:
        """Stop what is under way; what is durable stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.loader.close()
        await self.host.close()
        await self.keeper.settle()
        await self.directory.close()

    # Changes of a name.

    def check_name(self, name: str) -> None:
        """Raises AdapterNameInvalid or NameConflict when no adapter may have the name."""
        self.registry.check_name(name)
        self.aliases.refuse_name(name)

    async def submit(self, wanted: WantedAdapter) -> LoadJob:
        """Begin to load or replace. Raises AdapterError for what can be told at once, CatalogueError, and Unavailable
        of a server that shuts down; then nothing changed.
        """
        self.check_name(wanted.name)
        if not self.engine.is_healthy:
            raise Unavailable("the server is shutting down and loads no adapters")
        return await self.loader.submit(wanted)

    async def load(self, name: str, source: str, *, load_inplace: bool = False, managed_by: str = "api") -> AdapterLoad:
        """Load and wait. Raises AdapterError (whatever is wrong with name, source or room) or ServerError; then nothing
        is left behind and `name` is as it was.
        """
        wanted = replace(self.changes.asked(name, source, load_inplace=load_inplace), managed_by=managed_by)
        try:
            job = await self.submit(wanted)
        except (AdapterError, ServerError) as error:
            self._metrics.adapter_loaded("refused" if isinstance(error, AdapterError) else "failed", 0.0)
            raise
        return await job.wait()

    async def unload(self, name: str, *, abort: bool = False, deadline: float | None = None) -> Unloaded:
        """Take the name away at once. Its version is freed when the last request that uses it has ended: they are ended
        now (`abort`), or `deadline` seconds from now, or not at all. Raises AdapterNotFound, NameConflict.
        """
        return self._noted(await self._unloading.unload(name, abort=abort, deadline=deadline))

    async def _expire(self, name: str) -> None:
        """As `unload`, if the name's time is over still. Raises StillWanted, too."""
        over = partial(is_over, now=time.time())
        self._noted(await self._unloading.unload(name, abort=False, deadline=None, only_if=over))

    def _noted(self, unloaded: Unloaded) -> Unloaded:
        self._metrics.adapter_unloaded(unloaded.name)
        version = unloaded.ref.version[:12] if unloaded.ref else "none"
        logger.info("adapter %s unloaded (version %s)", unloaded.name, version)
        return unloaded

    def check_integrity(self) -> None:
        """Raises AssertionError when the parts disagree."""
        self.registry.check_integrity()
        self.directory.check_integrity()
        self.host.check_integrity()

    def _on_released(self, version: AdapterVersion) -> None:
        self.host.released(version)
        self.keeper.review(version)
        if not self.registry.num_leases(version) and (name := self.registry.last_name_of(version)) is not None:
            self.events.publish(name)  # it has drained

    def _on_version(self, version: AdapterVersion) -> None:
        for name in self.registry.names_of(version):
            self.events.publish(name)

    def _on_record(self, name: str, versions: Collection[AdapterVersion]) -> None:
        self.events.publish(name)
        if self._has_started:  # `start` does it once for all
            for version in versions:
                self._settle(version)

    def _settle(self, version: AdapterVersion) -> None:
        """Who asks for it, and how much, may have changed."""
        self.changes.follow_policy(version)
        self.keeper.review(version)
