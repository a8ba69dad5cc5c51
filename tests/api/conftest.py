"""The application over ASGI and over a socket, on a fake engine."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import httpx
import pytest
import pytest_asyncio
import uvicorn
from fastapi import FastAPI

from server.api.app import create_app
from server.api.context import ServerContext
from server.api.h11_protocol import h11_protocol
from server.config import HTTPConfig, ServerConfig
from server.lifecycle.adapter_service import AdapterService
from server.lifecycle.sources.upload_store import UploadStore
from server.metrics import Metrics
from tests.api.fakes import BASE, FakeAdapters, FakeAsyncEngine, adapter_ref
from tests.server.fakes import byte_level_tokenizer

SQL_TEXT = "select * from table where x = 1;"


@dataclass
class World:
    """Everything a test looks at."""

    engine: FakeAsyncEngine
    adapters: FakeAdapters
    context: ServerContext
    app: FastAPI

    def check_idle(self) -> None:
        assert self.adapters.open_leases == []
        self.engine.check_idle()


def make_world(http: HTTPConfig | None = None) -> World:
    tokenizer = byte_level_tokenizer()
    engine = FakeAsyncEngine(tokenizer)
    sql, chat = adapter_ref("sql", "a"), adapter_ref("team/chat", "b")
    engine.texts.update({sql.version: SQL_TEXT, chat.version: "stop stopping END"})
    adapters = FakeAdapters({ref.name: ref for ref in (sql, chat)})
    context = ServerContext(
        engine=engine,
        tokenizer=tokenizer,
        adapters=cast(AdapterService, adapters),
        uploads=cast(UploadStore, None),  # no route of this world takes uploads
        metrics=Metrics(BASE),
        config=ServerConfig(http=http or HTTPConfig()),
        model_name=BASE,
    )
    return World(engine, adapters, context, create_app(context))


def client_for(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers)


@pytest.fixture
def world() -> Iterator[World]:
    world = make_world()
    yield world
    world.check_idle()


@pytest_asyncio.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with client_for(world.app) as client:
        yield client


@dataclass
class LiveServer:
    """A uvicorn server on loopback in a thread of its own, set up as the command line does."""

    world: World
    url: str
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], Any]) -> None:
        """Run on the server's loop."""
        self.loop.call_soon_threadsafe(function)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.005)


@contextlib.contextmanager
def serve(world: World) -> Iterator[LiveServer]:
    config = uvicorn.Config(
        world.app,
        host="127.0.0.1",
        port=0,
        http=h11_protocol(world.context.metrics.error),
        h11_max_incomplete_event_size=world.context.config.http.max_header_bytes,
        log_level="critical",
        lifespan="off",
    )
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield LiveServer(world, f"http://127.0.0.1:{port}", loops[0])
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def live() -> Iterator[LiveServer]:
    world = make_world()
    with serve(world) as live:
        yield live
        live.wait_until(lambda: not world.adapters.open_leases)
        world.check_idle()


def with_keys(*, api_key: str | None = None, admin_api_key: str | None = None) -> HTTPConfig:
    return replace(HTTPConfig(), api_key=api_key, admin_api_key=admin_api_key)
