"""Loads adapters: source → checked weights → disk → the durable record → the name. One load of a name at a time.

Whatever goes wrong before the record is durable leaves everything as it was; from there on nothing can. Knows no HTTP,
and nothing of requests or of who uses what.
"""

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from adapters.adapter_ref import AdapterVersion
from adapters.checkpoint import LoadedAdapter
from adapters.errors import AdapterAlreadyLoaded, AdapterError
from adapters.lora_model import LoRAModel
from adapters.version_store import VersionStore
from server.errors import ServerError
from server.lifecycle.adapter_events import AdapterEvents, AtMostEvery
from server.lifecycle.catalogue_records import AdapterRecord, VersionRecord
from server.lifecycle.control import API_OWNER, MISS_OWNER, WantedAdapter
from server.lifecycle.directory import AdapterDirectory, ref_of
from server.lifecycle.errors import AdapterLoadCancelled
from server.lifecycle.failed_loads import FailedLoads
from server.lifecycle.host_tier import HostTier
from server.lifecycle.load_job import AdapterLoad, LoadJob, LoadOutcome, LoadStage, ProgressUnit
from server.lifecycle.load_threads import on_lent_core
from server.lifecycle.pending_load import accepted_by, announced, parse_pending, pending_text
from server.lifecycle.source_reader import SourceReader
from server.lifecycle.sources.in_thread import in_thread
from server.lifecycle.version_locks import VersionLocks
from server.metrics import Metrics

logger = logging.getLogger(__name__)

_TELL_EVERY = 0.5  # seconds, at most, of how far a load is


class AdapterLoader:
    """`keep_versions`: how many replaced versions a name keeps on disk. `server_id` is the same after a restart and no
    other server's. `on_dropped` is told of a version that was
    read and given up.
    """

    def __init__(
        self,
        directory: AdapterDirectory,
        sources: SourceReader,
        store: VersionStore,
        host: HostTier,
        metrics: Metrics,
        locks: VersionLocks,
        *,
        keep_versions: int,
        server_id: str,
        events: AdapterEvents,
        on_dropped: Callable[[AdapterVersion], None],
    ) -> None:
        self._directory = directory
        self._sources = sources
        self._store = store
        self._host = host
        self._metrics = metrics
        self._locks = locks
        self._keep_versions = keep_versions
        self._server_id = server_id
        self._on_change = events.publish
        self._on_dropped = on_dropped
        self._jobs: dict[str, LoadJob] = {}
        self._queued: dict[WantedAdapter, LoadJob] = {}  # not accepted yet: another has the name
        self._name_locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._failures = FailedLoads(directory, self.name_lock)

    @property
    def jobs(self) -> Mapping[str, LoadJob]:
        """By name, the loads under way."""
        return MappingProxyType(self._jobs)

    def sources(self) -> frozenset[str]:
        """Of the loads under way, and of those that wait for others."""
        return frozenset(job.wanted.source for job in (*self._jobs.values(), *self._queued.values()))

    def num_of(self, owner: str) -> int:
        """How many of these loads `owner` asked for."""
        return sum(job.wanted.managed_by == owner for job in (*self._jobs.values(), *self._queued.values()))

    def name_lock(self, name: str) -> asyncio.Lock:
        """Held while a name is loaded, changed or taken away."""
        return self._name_locks.setdefault(name, asyncio.Lock())

    async def submit(self, wanted: WantedAdapter) -> LoadJob:
        """Begin a load, or join the one that wants the same. For an API's caller it is durable when this returns.

        Raises AdapterError for what can be told without reading, CatalogueError; then nothing changed.
        """
        self._sources.check(wanted.source)
        job = self._jobs.get(wanted.name)
        if job is None or job.wanted != wanted:
            job = self._queued.get(wanted) or self._begin(wanted, is_new=wanted.managed_by == API_OWNER)
        await asyncio.shield(job.accepted)
        return job

    def resume(self, record: AdapterRecord, *, also_foreign: bool = False) -> None:
        """Go on with a load that was accepted before, by this server or, with `also_foreign`, one that may be gone."""
        if record.pending is None:
            return
        is_foreign = accepted_by(record.pending) != self._server_id
        if also_foreign or not is_foreign:
            job = self._begin(parse_pending(record.pending), is_new=False)
            job.pending, job.record_created_at, job.is_foreign = record.pending, record.created_at, is_foreign

    async def validate(self, source: str) -> LoadedAdapter:
        """Read and check, and keep nothing. Raises AdapterError."""
        return await self._sources.read(source)

    async def cancel(self, name: str) -> None:
        """End every load of a name that is under way or waits."""
        await self._cancel([job for job in (*self._queued.values(), *self._jobs.values()) if job.wanted.name == name])

    async def close(self) -> None:
        self._failures.close()
        await self._cancel([*self._queued.values(), *self._jobs.values()])

    async def _cancel(self, jobs: list[LoadJob]) -> None:
        await asyncio.gather(*(job.cancel() for job in jobs))

    def _begin(self, wanted: WantedAdapter, *, is_new: bool) -> LoadJob:
        job = self._queued[wanted] = LoadJob(wanted)
        job.task = asyncio.create_task(self._run(job, is_new=is_new))
        return job

    async def _run(self, job: LoadJob, *, is_new: bool) -> None:
        """Wait for the name, accept the load, do it. Whatever happens, whoever waits is told."""
        try:
            async with self.name_lock(job.wanted.name):
                await self._accept(job, is_new=is_new)
                await self._work(job)
        except BaseException as error:  # not accepted
            job.fail(_told(job, error))
        finally:
            if self._queued.get(job.wanted) is job:
                del self._queued[job.wanted]

    async def _accept(self, job: LoadJob, *, is_new: bool) -> None:
        if is_new:
            job.pending = pending_text(job.wanted, self._server_id)
            stored = await self._directory.retried(lambda: self._announce(job))
            job.record_created_at = stored.created_at
        del self._queued[job.wanted]
        self._jobs[job.wanted.name] = job
        job.accepted.set_result(None)
        self._on_change(job.wanted.name)

    async def _announce(self, job: LoadJob) -> AdapterRecord:
        known = self._directory.records.get(job.wanted.name)
        return await self._directory.put(announced(known, job.wanted, job.pending))

    async def _work(self, job: LoadJob) -> None:
        """Load, tell who waits, and give the name free; its lock is held."""
        began = time.monotonic()
        name = job.wanted.name
        try:
            load = await self._load(job)
        except BaseException as error:
            self._metrics.adapter_loaded("refused" if isinstance(error, AdapterError) else "failed", 0.0)
            await self._failed(job, error)
        else:
            self._metrics.adapter_loaded(load.outcome.value, time.monotonic() - began)
            logger.info("adapter %s is version %s, rank %d", name, load.ref.version[:12], load.ref.lora_rank)
            job.done.set_result(load)
        finally:
            del self._jobs[name]
            self._on_change(name)

    async def _load(self, job: LoadJob) -> AdapterLoad:
        wanted = job.wanted
        if wanted.managed_by == MISS_OWNER and (found := self._directory.current(wanted.name)) is not None:
            return AdapterLoad(found, LoadOutcome.UNCHANGED)  # somebody loaded it on purpose meanwhile

        def on_fetched() -> None:
            job.stage = LoadStage.VALIDATING
            self._on_change(wanted.name)

        tell = AtMostEvery(_TELL_EVERY, lambda: self._on_change(wanted.name))

        def progress(unit: ProgressUnit, num_done: int, num_total: int | None) -> None:
            job.progress(unit, num_done, num_total)
            tell()

        loaded = await self._sources.read(wanted.source, progress=progress, on_fetched=on_fetched)
        version = loaded.model.version
        self._outcome(wanted, version)  # refused before anything is kept
        try:
            async with self._locks.of(version):
                put = partial(on_lent_core, partial(self._store.put, loaded.model))
                await in_thread(put, executor=self._sources.threads, wait_if_cancelled=True)
                await self._host.put(loaded.model)
                if wanted.pin:
                    self._host.set_policy(version, loaded.model.num_bytes, pin=True, priority=wanted.priority)
                load = await self._directory.retried(lambda: self._commit(job, loaded))
                await self._keep_file(loaded.model)
                return load
        except BaseException as error:  # nobody may have a use for what is there now
            if getattr(error, "outcome_known", True):  # else the name may lead to it; what is unused goes later
                self._on_dropped(version)
            raise

    async def _keep_file(self, model: LoRAModel) -> None:
        """Another server in the same folder may have found the file without a use just before the commit."""
        if not await asyncio.to_thread(self._store.__contains__, model.version):
            with suppress(AdapterError):  # the load is done: what is missing is fetched again when it is asked for
                await in_thread(partial(self._store.put, model), wait_if_cancelled=True)

    def _outcome(self, wanted: WantedAdapter, version: AdapterVersion) -> LoadOutcome:
        """What the load will do to its name. Raises AdapterAlreadyLoaded."""
        record = self._directory.records.get(wanted.name)
        if record is None or record.version is None:
            return LoadOutcome.LOADED
        if record.version == version:
            return LoadOutcome.UNCHANGED
        if not wanted.load_inplace:
            raise AdapterAlreadyLoaded(
                f"{wanted.name!r} has already been loaded with other weights; unload it first or set load_inplace to "
                "true"
            )
        return LoadOutcome.REPLACED

    async def _commit(self, job: LoadJob, loaded: LoadedAdapter) -> AdapterLoad:
        """The moment from which the name stands for the version. Another server may have loaded the name meanwhile, or
        taken it away, which ends the load.
        """
        wanted, model = job.wanted, loaded.model
        known_record = self._directory.records.get(wanted.name)
        if job.record_created_at not in (None, known_record.created_at if known_record else 0.0):
            raise AdapterLoadCancelled(f"{wanted.name!r} was taken away by another server while it was being loaded")
        record = known_record or AdapterRecord(name=wanted.name)
        outcome = self._outcome(wanted, model.version)
        is_of_another = job.pending is not None and record.pending != job.pending
        known = VersionRecord(
            version=model.version,
            lora_rank=model.lora_rank,
            num_bytes=model.num_bytes,
            modules=tuple(loaded.report.modules),
            report=loaded.report,
            source=wanted.source,
        )
        new = replace(
            record,
            source=wanted.source,
            version=model.version,
            previous=self._directory.previous_after(record, model.version, self._keep_versions),
            pending=record.pending if is_of_another else None,
            failure=None,
            pin=wanted.pin,
            ttl=wanted.ttl,
            priority=wanted.priority,
            managed_by=wanted.managed_by,
        )
        is_by_accident = outcome is LoadOutcome.UNCHANGED and wanted.managed_by == API_OWNER
        if is_by_accident and record.managed_by not in (API_OWNER, MISS_OWNER):
            new = replace(new, source=record.source, managed_by=record.managed_by)  # it stays with its owner
        stored = await self._directory.put(new, known)
        return AdapterLoad(ref_of(stored, known), outcome)

    async def _failed(self, job: LoadJob, error: BaseException) -> None:
        """Tell whoever asked. If nobody waits, the record tells it; otherwise all is as it was before."""
        was_told = await self._failures.record(job, error)
        job.fail(_told(job, error))
        if not was_told:
            unforeseen = None if isinstance(error, AdapterError | ServerError) else error
            logger.warning("adapter %s could not be loaded: %s", job.wanted.name, error, exc_info=unforeseen)


def _told(job: LoadJob, error: BaseException) -> BaseException:
    """What those who wait for a load are told."""
    if isinstance(error, asyncio.CancelledError):
        return AdapterLoadCancelled(f"the load of {job.wanted.name!r} was ended by an unload or a shutdown")
    return error
