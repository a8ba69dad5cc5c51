"""Where names, files and the engine meet: load, replace, unload, resolve and describe adapters.

Owned by the event loop. Files are read in worker threads, weights go to the engine, names live in the registry; this
module keeps the three in step, so that no failure leaves a version in the engine that no name or lease holds, nor a
name without its version. Knows nothing of HTTP and nothing of how a file is checked.

`handover` is the one lock: a version enters or leaves the engine only under it, so that freeing a version and loading
the same bytes again cannot overtake each other.
"""

import asyncio
import logging
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from adapters.adapter_ref import AdapterRef, AdapterVersion, Lease
from adapters.checkpoint import LoadedAdapter
from adapters.errors import AdapterAlreadyLoaded, AdapterError, AdapterNotFound
from adapters.load_report import LoadReport
from adapters.lora_model import LoRAModel
from adapters.registry import AdapterInfo, AdapterRegistry, AdapterState
from adapters.untrusted_json import shown
from server.adapter_description import AdapterDescription, AdapterLoad
from server.adapter_metrics import AdapterResidency, ResidencySnapshot
from server.engine.request import EngineStats
from server.errors import ServerError
from server.metrics import Metrics
from server.model_names import ModelNames

logger = logging.getLogger(__name__)

ReadAdapter = Callable[[Path], LoadedAdapter]
"""Reads and checks one folder, in a worker thread; raises AdapterError."""

_MAX_READS = 2  # folders read at once; each may take as much memory as an adapter may have


class AdapterSourceNotAllowed(AdapterError):
    """The folder is outside those that adapters may be loaded from."""

    code = "adapter_source_not_allowed"


class AdapterEngine(Protocol):
    """What this module asks of `server.async_engine.AsyncEngine`."""

    @property
    def stats(self) -> EngineStats: ...
    def load_adapter(self, model: LoRAModel) -> Awaitable[None]: ...
    def unload_adapter(self, version: AdapterVersion) -> Awaitable[None]: ...


class AdapterService:
    """`base_names` are the served names of the base model, `lora_rows` the rows of the device pools, `max_loras` the
    limit of adapters per step (None = what the rows hold), `allowed_roots` the folders adapters may lie in (empty =
    anywhere the server can read).
    """

    def __init__(
        self,
        engine: AdapterEngine,
        read: ReadAdapter,
        metrics: Metrics,
        *,
        base_names: Sequence[str],
        lora_rows: int,
        max_loras: int | None = None,
        allowed_roots: Sequence[Path] = (),
    ) -> None:
        self._engine = engine
        self._read = read
        self._metrics = metrics
        self.started_at = time.time()  # seconds since the epoch
        self._lora_rows = lora_rows
        self._max_loras = max_loras
        self._allowed_roots = tuple(root.resolve() for root in allowed_roots)
        self.registry = AdapterRegistry(reserved_names=base_names, on_unused=self._on_unused)
        self.names = ModelNames(base_names, self.registry)
        self._reports: dict[AdapterVersion, LoadReport] = {}
        self._handover = asyncio.Lock()
        self._reads = asyncio.Semaphore(_MAX_READS)
        self._name_locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._freeing: dict[AdapterVersion, asyncio.Task[None]] = {}
        metrics.watch_adapters(self.residency)

    # Names to versions.

    def acquire(self, model: str) -> Lease | None:
        """Resolve what a client asked for and hold it; None = the base model. Raises ModelNotFound.

        An adapter's name, `base:adapter`, or one of the base's names; names may themselves contain ':'.
        """
        name = self.names.resolve(model)
        return None if name is None else self.registry.acquire(name)

    def describe(self, name: str) -> AdapterDescription:
        """Raises AdapterNotFound."""
        return self._description(self.registry.describe(name))

    def list(self) -> Sequence[AdapterDescription]:
        """All names in alphabetical order, then the versions that drain."""
        return [self._description(info) for info in self.registry.list()]

    def _description(self, info: AdapterInfo) -> AdapterDescription:
        version = info.ref.version
        tier = "device" if version in self._engine.stats.active_versions else "host"
        return AdapterDescription(info, self._reports[version], tier)

    # Load and unload.

    async def load(self, name: str, source: str, *, load_inplace: bool = False) -> AdapterRef:
        """Read, check and register the adapter in the local folder `source`; returns what `name` now stands for.

        The same bytes again under the same name succeed and change nothing. Other bytes need `load_inplace`: requests
        in flight keep the old version, which is freed when the last of them ends. Raises AdapterError (whatever is
        wrong with name, folder or room) or Unavailable; then nothing is left behind and `name` is as it was.
        """
        return (await self.load_reporting(name, source, load_inplace=load_inplace)).ref

    async def load_reporting(self, name: str, source: str, *, load_inplace: bool = False) -> AdapterLoad:
        """`load`, saying also whether the name was new."""
        began = time.monotonic()
        try:
            self.registry.check_name(name)
            folder = self._folder(source)
            async with self._name_locks.setdefault(name, asyncio.Lock()):
                load = await self._load(name, folder, load_inplace)
        except BaseException as error:
            self._metrics.adapter_loaded("refused" if isinstance(error, AdapterError) else "failed", 0.0)
            raise
        self._metrics.adapter_loaded(load.outcome, time.monotonic() - began)
        return load

    async def _load(self, name: str, folder: Path, load_inplace: bool) -> AdapterLoad:
        async with self._reads:
            loaded = await asyncio.to_thread(self._read, folder)
        ref = _ref(name, folder, loaded)
        async with self._handover:
            outcome = self._outcome(ref, load_inplace)
            return AdapterLoad(await self._hand_over(ref, loaded), outcome)

    async def unload(self, name: str) -> AdapterRef:
        """Take the name away at once; its version is freed when the last request that uses it has ended, and before
        this returns if there is none. Raises AdapterNotFound.
        """
        ref = self.registry.unregister(name)
        self._metrics.adapter_unloaded(name)
        if freeing := self._freeing.get(ref.version):
            await asyncio.shield(freeing)
        logger.info("adapter %s unloaded (version %s)", name, ref.version[:12])
        return ref

    async def settle(self) -> None:
        """Wait until every version nobody holds has left the engine; for tests and for shutdown."""
        while self._freeing:
            await asyncio.gather(*self._freeing.values())

    def _folder(self, source: str) -> Path:
        if not source or "\0" in source or "://" in source:
            raise AdapterNotFound(f"{shown(source)!r} is no local folder; adapters are loaded from local folders only")
        try:
            folder = Path(source).resolve()
        except (OSError, RuntimeError) as error:
            raise AdapterNotFound(f"no folder stands at {shown(source)!r}") from error
        roots = self._allowed_roots
        if roots and not any(folder.is_relative_to(root) for root in roots):
            raise AdapterSourceNotAllowed(f"{shown(source)!r} is outside the folders that adapters may be loaded from")
        return folder

    def _outcome(self, ref: AdapterRef, load_inplace: bool) -> str:
        """What registering `ref` will do to its name: loaded, unchanged or replaced. Raises AdapterAlreadyLoaded."""
        if ref.name not in self.registry:
            return "loaded"
        if self.registry.describe(ref.name).ref.version == ref.version:
            return "unchanged"
        if not load_inplace:
            raise AdapterAlreadyLoaded(
                f"{ref.name!r} has already been loaded with other weights; unload it first or set load_inplace to true"
            )
        return "replaced"

    async def _hand_over(self, ref: AdapterRef, loaded: LoadedAdapter) -> AdapterRef:
        """Engine first, name second, so that whoever finds the name finds the weights."""
        try:
            if not self.registry.is_held(ref.version):
                await self._engine.load_adapter(loaded.model)
            self._reports.setdefault(ref.version, loaded.report)
            registered = self.registry.register(ref, replace=True)
        except BaseException:  # cancelled too: the weights may have gone in all the same
            self._on_unused(ref.version)
            raise
        logger.info("adapter %s is version %s, rank %d", ref.name, ref.version[:12], ref.lora_rank)
        return registered

    def _on_unused(self, version: AdapterVersion) -> None:
        """Free a version once the handover lock is to be had, if nobody holds it then."""
        task = asyncio.get_running_loop().create_task(self._free(version))
        self._freeing[version] = task
        task.add_done_callback(lambda done: self._freed(version, done))

    async def _free(self, version: AdapterVersion) -> None:
        async with self._handover:
            if self.registry.is_held(version):
                return
            self._reports.pop(version, None)
            try:
                await self._engine.unload_adapter(version)
            except ServerError as error:  # the engine is gone, and its memory with it
                logger.info("version %s not unloaded: %s", version[:12], error)

    def _freed(self, version: AdapterVersion, task: asyncio.Task[None]) -> None:
        if self._freeing.get(version) is task:
            del self._freeing[version]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("version %s could not be freed", version[:12], exc_info=error)

    # For the metrics and the checks.

    def residency(self) -> ResidencySnapshot:
        """Who is resident and in use, for the gauges."""
        stats = self._engine.stats
        return ResidencySnapshot(
            adapters=[
                AdapterResidency(
                    name=info.ref.name,
                    version=info.ref.version,
                    lora_rank=info.ref.lora_rank,
                    is_registered=info.state is AdapterState.READY,
                    in_flight=info.leases > 0,
                )
                for info in self.registry.list()
            ],
            running_versions=frozenset(stats.running_versions),
            waiting_versions=frozenset(stats.waiting_versions),
            active_versions=frozenset(stats.active_versions),
            max_device_adapters=self._max_device_adapters(),
            updated_at=self._metrics.last_step_at,
        )

    @property
    def host_bytes(self) -> int:
        """Of host memory that the versions held take; one under two names counts once."""
        return sum({info.ref.version: info.ref.num_bytes for info in self.registry.list()}.values())

    def _max_device_adapters(self) -> int:
        """`max_loras`, or how many adapters of the widest loaded rank (16 while there is none) the rows hold."""
        if self._max_loras is not None:
            return self._max_loras
        ranks = [info.ref.lora_rank for info in self.registry.list()]
        return self._lora_rows // max(ranks, default=16)

    def check_integrity(self) -> None:
        """Raises AssertionError when the registry is at odds with itself or with what is described."""
        self.registry.check_integrity()
        held = {info.ref.version for info in self.registry.list()}
        assert held <= self._reports.keys(), "a version is held that has no report"
        assert self._reports.keys() - held <= self._freeing.keys(), "a report is kept of a version nobody holds"


def _ref(name: str, folder: Path, loaded: LoadedAdapter) -> AdapterRef:
    model = loaded.model
    return AdapterRef(
        name=name,
        version=model.version,
        source=str(folder),
        lora_rank=model.lora_rank,
        num_bytes=model.num_bytes,
        modules=tuple(loaded.report.modules),
    )
