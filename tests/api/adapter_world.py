"""The application with the real adapter service and loader, and an engine that only keeps adapters."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import torch

from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.lora_model import LoRAModel
from server.adapter_service import AdapterService
from server.api.app import create_app
from server.api.context import ServerContext
from server.config import EngineConfig, HTTPConfig, ModelConfig, ServerConfig
from server.metrics import Metrics
from tests.adapters.hostile import healthy
from tests.api.fakes import FakeAsyncEngine
from tests.server.fakes import TINY_BASE, FakeAdapterEngine, byte_level_tokenizer

BASES = ("org/base", "org/base:latest")
LIMITS = CheckpointLimits(max_lora_rank=16, max_adapter_bytes=1 << 20)


class KeepingEngine(FakeAsyncEngine):
    """Requests from one fake, adapters from the other."""

    def __init__(self) -> None:
        super().__init__(byte_level_tokenizer())
        self.kept = FakeAdapterEngine()

    async def load_adapter(self, model: LoRAModel) -> None:
        await self.kept.load_adapter(model)

    async def unload_adapter(self, version: str) -> None:
        await self.kept.unload_adapter(version)


@dataclass
class AdapterWorld:
    engine: KeepingEngine
    service: AdapterService
    metrics: Metrics
    client: httpx.AsyncClient
    folder: Path

    def adapter(self, name: str, seed: int = 0) -> str:
        return str(healthy(self.folder / name, TINY_BASE, seed=seed))


@asynccontextmanager
async def adapter_world(folder: Path, http: HTTPConfig | None = None) -> AsyncIterator[AdapterWorld]:
    engine, metrics = KeepingEngine(), Metrics(BASES[0])
    read = partial(load_lora_model, base=TINY_BASE, limits=LIMITS, dtype=torch.float32)
    service = AdapterService(engine, read, metrics, base_names=BASES, lora_rows=64)
    context = ServerContext(
        engine=engine,
        tokenizer=engine.tokenizer,
        adapters=service,
        metrics=metrics,
        config=ServerConfig(
            http=http or HTTPConfig(),
            engine=EngineConfig(model=ModelConfig(model="/models/base")),
            served_model_names=BASES,
        ),
        model_name=BASES[0],
    )
    transport = httpx.ASGITransport(create_app(context))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield AdapterWorld(engine, service, metrics, client, folder)
    await service.settle()
    service.check_integrity()
    assert set(engine.kept.host) == {info.ref.version for info in service.registry.list()}
