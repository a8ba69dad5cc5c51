"""Requests for adapters that are not in memory: they wait, up to a deadline, and for nobody who has left."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.adapter_ref import AdapterVersion
from adapters.lora_model import LoRAModel
from tests.api.adapter_world import AdapterWorld, adapter_world
from tests.api.test_adapter_life import hold_reads, load, until_job

pytestmark = pytest.mark.asyncio

ROUTES = [
    ("/v1/completions", {"model": "sql", "prompt": "x", "max_tokens": 4}),
    ("/v1/chat/completions", {"model": "sql", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}),
]


def hold_cold_reads(world: AdapterWorld, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Versions come from disk only once the event is set."""
    gate, traffic = asyncio.Event(), world.service.host._traffic
    read = traffic._read

    async def held(version: AdapterVersion) -> LoRAModel:
        await gate.wait()
        return await read(version)

    monkeypatch.setattr(traffic, "_read", held)
    return gate


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_adapter_on_disk_is_read_and_answers(
    tmp_path: Path, path: str, body: dict[str, Any], is_stream: bool
) -> None:
    async with adapter_world(tmp_path) as world:
        adapter = await load(world, "sql", world.adapter("a"))
        await world.cool("sql")
        now = (await world.client.get("/v1/adapters/sql")).json()
        assert (now["state"], now["tier"]) == ("registered", "disk")
        reply = await world.client.post(path, json={**body, "stream": is_stream})
        assert reply.status_code == 200
        assert reply.headers["x-loramux-adapter-version"] == adapter["version"]
        assert (await world.client.get("/v1/adapters/sql")).json()["state"] == "ready"


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_past_the_deadline_it_is_503_with_retry_after(
    tmp_path: Path, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with adapter_world(tmp_path, cold_timeout=0.05) as world:
        await load(world, "sql", world.adapter("a"))
        await world.cool("sql")
        gate = hold_cold_reads(world, monkeypatch)
        for is_stream in (False, True):
            reply = await world.client.post(path, json={**body, "stream": is_stream})
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "adapter_not_ready")
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["type"] == "server_error"
        assert world.engine.streams == []
        gate.set()
        await until(lambda: len(world.engine.kept.host) == 1)
        assert (await world.client.post(path, json=body)).status_code == 200


async def test_a_name_that_is_being_loaded_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with adapter_world(tmp_path, cold_timeout=30) as world:
        gate = hold_reads(world, monkeypatch)
        await world.client.post("/v1/adapters", json={"name": "sql", "source": world.adapter("a")})
        asking = [asyncio.create_task(world.client.post(path, json=body)) for path, body in ROUTES]
        job = await until_job(world, "sql")
        await until(lambda: job.num_waiters == 2)
        gate.set()
        assert [(await each).status_code for each in asking] == [200, 200]


async def test_a_load_that_takes_too_long_is_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with adapter_world(tmp_path, cold_timeout=0.02) as world:
        gate = hold_reads(world, monkeypatch)
        await world.client.post("/v1/adapters", json={"name": "sql", "source": world.adapter("a")})
        reply = await world.client.post(*ROUTES[0][:1], json=ROUTES[0][1])
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "adapter_not_ready")
        assert "retry-after" in reply.headers
        gate.set()


async def test_names_come_from_the_template(tmp_path: Path) -> None:
    async with adapter_world(tmp_path, template=str(tmp_path / "{name}")) as world:
        world.adapter("sql")
        for path, body in ROUTES:
            assert (await world.client.post(path, json=body)).status_code == 200
            status, error = await world.refused("POST", path, json={**body, "model": "nobody"})
            assert (status, error["code"]) == (404, "model_not_found")
        assert (await world.client.get("/v1/adapters/sql")).json()["managed_by"] == "miss"


class Leaving:
    """One HTTP request to the application, whose client leaves when it is told to."""

    def __init__(self, world: AdapterWorld, path: str, body: Any, method: str = "POST") -> None:
        self._parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self._left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        path, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": [(b"host", b"test"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1), "server": ("test", 80), "state": {},
        }  # fmt: skip
        self.task = asyncio.create_task(world.app(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> dict[str, Any]:
        if self._parts:
            return self._parts.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    async def leave(self) -> None:
        self._left.set()
        async with asyncio.timeout(60):
            await self.task


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_nothing_waits_for_a_client_that_left_its_cold_adapter(
    tmp_path: Path, path: str, body: dict[str, Any], is_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with adapter_world(tmp_path, cold_timeout=3600) as world:
        await load(world, "sql", world.adapter("a"))
        await world.cool("sql")
        gate = hold_cold_reads(world, monkeypatch)
        request = Leaving(world, path, {**body, "stream": is_stream})
        await until(lambda: world.service.host.num_waiting == 1)
        assert world.service.registry.describe("sql").leases == 1
        await request.leave()
        assert world.service.host.num_waiting == 0
        assert world.service.registry.describe("sql").leases == 0
        assert world.engine.streams == []
        gate.set()  # what had begun to be read is kept for the next
        await until(lambda: len(world.engine.kept.host) == 1)


async def test_nothing_waits_for_a_client_that_left_a_name_being_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with adapter_world(tmp_path, cold_timeout=3600) as world:
        gate = hold_reads(world, monkeypatch)
        await world.client.post("/v1/adapters", json={"name": "sql", "source": world.adapter("a")})
        request = Leaving(world, *ROUTES[0])
        job = await until_job(world, "sql")
        await until(lambda: job.num_waiters == 1)
        await request.leave()
        assert job.num_waiters == 0 and not job.done.done()
        gate.set()


async def test_a_load_goes_on_without_the_client_that_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with adapter_world(tmp_path) as world:
        gate = hold_reads(world, monkeypatch)
        source = str(tmp_path / "a")
        request = Leaving(world, "/v1/adapters?wait=600", {"name": "sql", "source": world.adapter("a")})
        job = await until_job(world, "sql")
        await until(lambda: job.num_waiters == 1)
        await request.leave()
        assert job.num_waiters == 0
        gate.set()
        await until(lambda: not world.service.loader.jobs)
        assert (await world.client.get("/v1/adapters/sql")).json()["source"] == source


async def test_deleting_with_abort_ends_the_wait_for_a_cold_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with adapter_world(tmp_path, cold_timeout=3600) as world:
        await load(world, "sql", world.adapter("a"))
        await world.cool("sql")
        gate = hold_cold_reads(world, monkeypatch)
        asking = asyncio.create_task(world.client.post(ROUTES[0][0], json=ROUTES[0][1]))
        await until(lambda: world.service.host.num_waiting == 1)
        deleting = asyncio.create_task(world.client.delete("/v1/adapters/sql?mode=abort"))
        reply = await asking
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
        assert "abort" in reply.json()["error"]["message"]
        gate.set()
        assert (await deleting).status_code == 200
