"""A whole AdapterService on a state folder, its engine a host cache that answers: what restarts and replicas are
tried on. Everything that is on disk is the server's own.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from adapters.adapter_folder import AdapterFolder
from adapters.adapter_ref import AdapterVersion
from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.lora_model import LoRAModel
from adapters.version_store import VersionStore, base_key
from server.config import LoRALimits
from server.lifecycle.adapter_service import AdapterService
from server.lifecycle.catalogue import Catalogue
from server.lifecycle.sources.sources import SourceLimits, Sources
from server.lifecycle.sources.upload_store import UploadStore
from server.lifecycle.state_folder import StateFolder
from server.metrics import Metrics
from tests.adapters.hostile import healthy
from tests.server.fakes import TINY_BASE, FakeAdapterEngine

LIMITS = CheckpointLimits(max_lora_rank=16, max_adapter_bytes=1 << 20)
DTYPE = torch.float32
_PATIENCE = 60.0  # seconds
BASE_KEY = base_key(TINY_BASE, DTYPE)
read_adapter = partial(load_lora_model, base=TINY_BASE, limits=LIMITS, dtype=DTYPE)


@dataclass(frozen=True)
class World:
    service: AdapterService
    store: VersionStore
    engine: FakeAdapterEngine
    state: StateFolder
    uploads: UploadStore

    def check_integrity(self) -> None:
        self.service.check_integrity()
        self.store.check_integrity()
        self.engine.host.check_integrity()

    async def settled(self) -> None:
        """Until nothing is being loaded or freed."""
        async with asyncio.timeout(_PATIENCE):
            while self.service.loader.jobs or self._pending():
                await asyncio.sleep(0.001)
        await self.service.keeper.settle()

    def _pending(self) -> bool:
        """Whether a load is acknowledged and not at its end, whether or not somebody works on it."""
        return any(record.pending for record in self.service.directory.records.values())


@asynccontextmanager
async def serving(
    folder: Path,
    *,
    catalogue_url: str | None = None,
    store: VersionStore | None = None,
    limits: LoRALimits | None = None,
) -> AsyncIterator[World]:
    """A service on `folder`, started."""
    state = StateFolder.at(folder)
    engine = FakeAdapterEngine()
    store = store or VersionStore(state.versions, base_key=BASE_KEY)
    uploads = UploadStore(state.uploads, quota=1 << 26, max_bytes=1 << 20)
    sources = Sources(staging=state.staging, limits=SourceLimits(max_bytes=1 << 20), uploads=uploads)
    service = AdapterService(
        engine,
        read_adapter,
        Metrics("base"),
        catalogue=Catalogue.open(catalogue_url or state.catalogue_url),
        store=store,
        sources=sources,
        base_names=["base"],
        limits=limits or LoRALimits(cpu_lora_memory=1 << 18),
        uploads=uploads,
        server_id=state.server_id(),
    )
    try:
        await service.start()
        yield World(service, store, engine, state, uploads)
    finally:
        await service.close()
        sources.close()
        uploads.close()


def adapter_folder(folder: Path, seed: int) -> str:
    """Where an adapter of its own weights for each seed lies."""
    path = folder / str(seed)
    if not path.exists():
        healthy(path, TINY_BASE, seed=seed)
    return str(path)


@cache
def model_in(source: str) -> LoRAModel:
    with AdapterFolder.find(Path(source)) as folder:
        return read_adapter(folder).model


def version_in(source: str) -> AdapterVersion:
    return model_in(source).version
