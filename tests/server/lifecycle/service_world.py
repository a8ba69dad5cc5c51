"""A whole adapter service on a fake engine: real catalogue, version store and sources, all below one folder.

What a test can turn: how the engine behaves, when a folder has been read, what the catalogue and the disk refuse. A
second `ServiceWorld` on the same state is a restart; one on the same catalogue and another disk is a replica.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.adapter_folder import AdapterFolder
from adapters.adapter_ref import AdapterRef, AdapterVersion, Lease
from adapters.checkpoint import CheckpointLimits, LoadedAdapter, load_lora_model
from adapters.version_store import VersionStore, base_key
from server.config import LoRALimits
from server.lifecycle.adapter_service import AdapterService
from server.lifecycle.catalogue import Catalogue
from server.lifecycle.catalogue_errors import CatalogueUnavailable
from server.lifecycle.catalogue_records import AdapterRecord
from server.lifecycle.sources.sources import SourceLimits, Sources
from server.lifecycle.sources.upload_store import UploadStore
from server.metrics import Metrics
from tests.adapters.hostile import healthy
from tests.server.fakes import TINY_BASE, FakeAdapterEngine

MAX_BYTES = 1 << 20
LIMITS = CheckpointLimits(max_lora_rank=16, max_adapter_bytes=MAX_BYTES)
BASES = ("org/base", "org/base:v1", "alias")
READ = partial(load_lora_model, base=TINY_BASE, limits=LIMITS, dtype=torch.float32)


@dataclass
class Reader:
    """The real loader; counts its reads and, while `gate` is cleared, holds them up."""

    num_reads: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    replacement: LoadedAdapter | None = None  # returned for what was read
    on_read: Callable[[], object] = field(default=lambda: None)  # in the worker thread, before it returns

    def __post_init__(self) -> None:
        self.gate.set()

    def __call__(self, folder: AdapterFolder, /, **asked: Any) -> LoadedAdapter:
        self.num_reads += 1
        assert self.gate.wait(60)
        loaded = READ(folder, **asked)
        self.on_read()
        return self.replacement or loaded


class FailingCatalogue:
    """A catalogue whose writes fail from the `fail_from`th on; `calls` are the writes there were."""

    def __init__(self, real: Catalogue) -> None:
        self._real = real
        self.calls: list[str] = []
        self.fail_from: int | None = None
        self.on_write: Callable[[], object] = lambda: None  # in the catalogue's thread, before it writes

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._real, name)
        if name in ("changes", "snapshot", "close"):
            return call

        def counted(*args: Any) -> Any:
            self.calls.append(name)
            if self.fail_from is not None and len(self.calls) > self.fail_from:
                raise CatalogueUnavailable("the catalogue is away")
            self.on_write()
            return call(*args)

        return counted

    def fail_after(self, num_calls: int) -> None:
        """Let so many more calls succeed."""
        self.fail_from = len(self.calls) + num_calls

    def heal(self) -> None:
        self.fail_from = None


@dataclass
class ServiceWorld:
    engine: FakeAdapterEngine
    reader: Reader
    metrics: Metrics
    service: AdapterService
    catalogue: FailingCatalogue
    store: VersionStore
    uploads: UploadStore

    def held(self) -> set[AdapterVersion]:
        """In the engine's host memory."""
        return set(self.engine.host)

    def on_disk(self) -> set[AdapterVersion]:
        return set(self.store.versions())

    def record(self, name: str) -> AdapterRecord:
        return self.service.directory.records[name]

    def state(self, name: str) -> str:
        return self.service.view.describe(name).state.value

    def lease(self, model: str, key: str | None = None) -> Lease:
        lease = self.service.acquire(model, key)
        assert lease is not None
        return lease

    async def load(self, name: str, source: str, **options: Any) -> AdapterRef:
        return (await self.service.load(name, source, **options)).ref

    async def use(self, model: str, key: str | None = None) -> AdapterVersion:
        """As a request does: resolve, wait until it is in memory, and look whether the engine has it."""
        lease = await self.service.resolve(model, key)
        assert lease is not None
        try:
            await self.service.ready(lease)
            assert lease.ref.version in self.held(), "a request would run on a version that the engine does not have"
            return lease.ref.version
        finally:
            lease.release()

    async def check_settled(self) -> None:
        """Memory has nothing that no name stands for and no request uses, the disk nothing that no name has."""
        service = self.service
        await service.keeper.settle()
        service.check_integrity()
        self.engine.host.check_integrity()
        registry = service.registry
        for version in self.held():
            is_needed = service.directory.is_wanted(version) or registry.num_leases(version)
            assert is_needed, "a version was not freed"
        assert self.held() == {version for version in self.held() if version in service.host}
        named = {v for record in service.directory.records.values() for v in record.named_versions}
        leased = {version for version in self.on_disk() if registry.num_leases(version)}
        assert self.on_disk() <= named | leased, "a version was left on disk"


@asynccontextmanager
async def service_world(
    state: Path,
    *,
    catalogue_url: str | None = None,
    roots: tuple[Path, ...] = (),
    limits: LoRALimits | None = None,
    engine: FakeAdapterEngine | None = None,
    is_started: bool = True,
    **options: Any,
) -> AsyncIterator[ServiceWorld]:
    """A service, started and closed again; what it holds is checked unless its engine is dead."""
    state.mkdir(parents=True, exist_ok=True)
    limits = limits or LoRALimits(cpu_lora_memory=MAX_BYTES)
    engine = engine or FakeAdapterEngine(limits.cpu_lora_memory)
    reader, metrics = Reader(), Metrics(BASES[0])
    uploads = UploadStore(state / "uploads", quota=MAX_BYTES, max_bytes=MAX_BYTES)
    sources = Sources(roots=roots, staging=state / "staging", limits=SourceLimits(max_bytes=MAX_BYTES), uploads=uploads)
    catalogue = FailingCatalogue(Catalogue.open(catalogue_url or f"sqlite:///{state}/catalogue.db"))
    store = VersionStore(state / "versions", base_key=base_key(TINY_BASE, torch.float32))
    service = AdapterService(
        engine,
        reader,
        metrics,
        catalogue=catalogue,  # type: ignore[arg-type]
        store=store,
        sources=sources,
        base_names=BASES,
        limits=limits,
        uploads=uploads,
        **{"lora_rows": 64, "row_bytes": 1000, **options},
    )
    world = ServiceWorld(engine, reader, metrics, service, catalogue, store, uploads)
    try:
        if is_started:
            await service.start()
        yield world
        reader.gate.set()
        if engine.dead is None and is_started:
            await world.check_settled()
    finally:
        reader.gate.set()
        catalogue.heal()
        await service.close()
        await asyncio.to_thread(sources.close)
        uploads.close()


def adapter(folder: Path, seed: int = 0, r: int = 4) -> str:
    return str(healthy(folder, TINY_BASE, seed=seed, r=r))


def adapter_bytes(tmp_path: Path, r: int = 4) -> int:
    """What an adapter of that rank takes in host memory."""
    return READ(Path(adapter(tmp_path / f"measured{r}", seed=99, r=r))).model.num_bytes


async def until(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    """Generous: the machine may be busy, or stand still."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def damage(store_folder: Path, version: AdapterVersion) -> None:
    """Turn a byte of the version's file over."""
    (path,) = store_folder.rglob(f"{version}*")
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 0xFF]))


@contextlib.contextmanager
def patched(target: Any, name: str, value: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield
