"""The application with the real adapter service, sources, uploads and catalogue; the engine only keeps adapters."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI

from adapters.adapter_ref import AdapterVersion
from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.lora_model import LoRAModel
from adapters.version_store import VersionStore, base_key
from server.api.app import create_app
from server.api.context import ServerContext
from server.config import EngineConfig, HTTPConfig, LoRALimits, ModelConfig, ServerConfig
from server.engine.request import Request
from server.lifecycle.adapter_service import AdapterService
from server.lifecycle.catalogue import Catalogue
from server.lifecycle.source_reader import ReadAdapter
from server.lifecycle.sources.source_template import SourceTemplate
from server.lifecycle.sources.sources import SourceLimits, Sources
from server.lifecycle.sources.upload_store import UploadStore
from server.lifecycle.state_folder import StateFolder
from server.metrics import Metrics
from tests.adapters.hostile import healthy
from tests.api.fakes import REPLY, FakeAsyncEngine
from tests.server.fakes import TINY_BASE, FakeAdapterEngine, byte_level_tokenizer

BASES = ("org/base", "org/base:latest")
LIMITS = CheckpointLimits(max_lora_rank=16, max_adapter_bytes=1 << 20)
QUOTA = 64 << 10  # bytes of all uploads; an adapter of these tests takes about 2000


class KeepingEngine(FakeAsyncEngine):
    """Requests from one fake, adapters from the other. No request may come before its adapter is there."""

    def __init__(self) -> None:
        super().__init__(byte_level_tokenizer())
        self.kept = FakeAdapterEngine()

    def token_ids(self, request: Request) -> list[int]:
        for use in request.adapters:
            assert use.version in self.kept.host, "a request was admitted before its adapter was in memory"
        return self.tokenizer.encode(REPLY)

    async def load_adapter(self, model: LoRAModel) -> None:
        await self.kept.load_adapter(model)

    async def unload_adapter(self, version: AdapterVersion) -> None:
        await self.kept.unload_adapter(version)


@dataclass
class AdapterWorld:
    engine: KeepingEngine
    service: AdapterService
    uploads: UploadStore
    metrics: Metrics
    app: FastAPI
    client: httpx.AsyncClient
    folder: Path

    def adapter(self, name: str, seed: int = 0) -> str:
        return str(healthy(self.folder / name, TINY_BASE, seed=seed))

    async def settle(self) -> None:
        """Until nothing is being loaded or freed."""
        for job in tuple(self.service.loader.jobs.values()):
            assert job.task is not None
            await job.task
        await self.service.keeper.settle()

    async def cool(self, name: str) -> None:
        """Take what a name stands for out of memory, as others would that need the room; it stays on disk."""
        version = self.service.registry.describe(name).ref.version
        assert await self.service.host.drop(version) > 0
        assert version not in self.engine.kept.host

    async def refused(self, method: str, path: str, **kwargs: Any) -> tuple[int, dict[str, Any]]:
        """An error's status and its body, which has OpenAI's four keys whatever else."""
        reply = await self.client.request(method, path, **kwargs)
        assert reply.status_code >= 400, reply.text
        error: dict[str, Any] = reply.json()["error"]
        assert {"message", "type", "param", "code"} <= error.keys()
        assert isinstance(error["message"], str) and error["message"]
        assert error["type"] == ("invalid_request_error" if reply.status_code < 500 else "server_error")
        return reply.status_code, error


@asynccontextmanager
async def adapter_world(
    folder: Path,
    http: HTTPConfig | None = None,
    *,
    lora: LoRALimits | None = None,
    cold_timeout: float = 30.0,
    roots: tuple[Path, ...] = (),
    template: str | None = None,
    read: ReadAdapter | None = None,
    fingerprint: str = "",
) -> AsyncIterator[AdapterWorld]:
    engine, metrics, lora = KeepingEngine(), Metrics(BASES[0]), lora or LoRALimits()
    state = StateFolder.at(folder / ".state")
    uploads = UploadStore(state.uploads, quota=QUOTA, max_bytes=LIMITS.max_adapter_bytes)
    limits = SourceLimits(max_bytes=LIMITS.max_adapter_bytes)
    service = AdapterService(
        engine,
        read or partial(load_lora_model, base=TINY_BASE, limits=LIMITS, dtype=torch.float32),
        metrics,
        catalogue=Catalogue.open(state.catalogue_url),
        store=VersionStore(state.versions, base_key=base_key(TINY_BASE, torch.float32), fingerprint=fingerprint),
        sources=Sources(roots=roots, allowed_urls=("hf://",), staging=state.staging, limits=limits, uploads=uploads),
        base_names=BASES,
        limits=lora,
        cold_timeout=cold_timeout,
        template=None if template is None else SourceTemplate(template),
        uploads=uploads,
        lora_rows=64,
    )
    await service.start()
    context = ServerContext(
        engine=engine,
        tokenizer=engine.tokenizer,
        adapters=service,
        uploads=uploads,
        metrics=metrics,
        config=ServerConfig(
            http=http or HTTPConfig(),
            engine=EngineConfig(model=ModelConfig(model="/models/base")),
            served_model_names=BASES,
        ),
        model_name=BASES[0],
    )
    app = create_app(context)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        world = AdapterWorld(engine, service, uploads, metrics, app, client, folder)
        try:
            yield world
            await world.settle()
            service.check_integrity()
            engine.check_idle()
            leased = [info for info in service.registry.list() if info.leases]
            assert not leased, f"leases were not given back: {leased}"
            named = {info.ref.version for info in service.registry.list()}
            named |= {version for alias in service.directory.aliases.values() for version in alias.named_versions}
            assert set(engine.kept.host) <= named, "weights are kept that nobody names"
            assert all(version in service.host for version in engine.kept.host)
            assert service.events.num_readers == 0
        finally:
            await service.close()
            uploads.close()
