"""GET /v1/adapters?watch=true: everything first, then each change; and what a reader that left costs."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.api.adapter_world import AdapterWorld, adapter_world
from tests.api.test_adapter_life import load
from tests.api.test_cold_adapters import Leaving, until

pytestmark = pytest.mark.asyncio


class Watch(Leaving):
    """A client of the stream; `next` gives the next description."""

    def __init__(self, world: AdapterWorld) -> None:
        super().__init__(world, "/v1/adapters?watch=true", None, method="GET")
        self._taken = 1  # the response's start

    async def next(self) -> dict[str, Any]:
        await until(lambda: len(self.sent) > self._taken)
        text = self.sent[self._taken]["body"].decode()
        self._taken += 1
        event, data = text.strip().split("\n", 1)
        assert event == "event: adapter"
        described: dict[str, Any] = json.loads(data.removeprefix("data: "))
        return described

    async def until_state(self, name: str, state: str) -> dict[str, Any]:
        while True:
            described = await self.next()
            if (described["name"], described["state"]) == (name, state):
                return described


@asynccontextmanager
async def watching(world: AdapterWorld) -> AsyncIterator[Watch]:
    watch = Watch(world)
    await until(lambda: world.service.events.num_readers == 1 and len(watch.sent) > 0)
    try:
        yield watch
    finally:
        await watch.leave()
        assert world.service.events.num_readers == 0


async def test_all_first_then_each_change(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        listed = [await load(world, name, world.adapter(name, seed)) for seed, name in enumerate(("a", "b"))]
        async with watching(world) as watch:
            start = watch.sent[0]
            assert start["status"] == 200
            assert (b"content-type", b"text/event-stream; charset=utf-8") in start["headers"]
            for each in listed:
                shown = await watch.next()
                assert (shown["name"], shown["version"], shown["state"]) == (each["name"], each["version"], "ready")
            new = await load(world, "new", world.adapter("c", 2), pin=True)
            shown = await watch.until_state("new", "ready")
            assert (shown["version"], shown["pin"]) == (new["version"], True)
            await world.client.patch("/v1/adapters/new", json={"priority": 7})
            while (await watch.until_state("new", "ready"))["priority"] != 7:
                pass  # an event of the load before
            await world.cool("a")
            assert (await watch.until_state("a", "registered"))["tier"] == "disk"
            await world.client.delete("/v1/adapters/b")
            gone = await watch.until_state("b", "unloaded")
            assert gone == unloaded("b", None)


async def test_a_version_that_drains_is_told_of_until_it_has_ended(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        old = (await load(world, "sql", world.adapter("a")))["version"]
        async with watching(world) as watch:
            first = world.service.acquire("sql")
            new = (await load(world, "sql", world.adapter("b", 1), load_inplace=True))["version"]
            second = world.service.acquire("sql")
            assert first is not None and second is not None
            await world.client.delete("/v1/adapters/sql")
            drain = [await watch.until_state("sql", "draining"), await watch.next()]
            assert {each["version"]: each["leases"] for each in drain} == {old: 1, new: 1}
            first.release()
            assert await watch.next() == unloaded("sql", old)
            second.release()
            assert await watch.next() == unloaded("sql", new)


async def test_a_version_that_gets_a_name_again_is_not_told_to_be_gone_after_it(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await load(world, "sql", world.adapter("a"))
        async with watching(world) as watch:
            await watch.until_state("sql", "ready")
            lease = world.service.acquire("sql")
            assert lease is not None
            await world.client.delete("/v1/adapters/sql")
            old = (await watch.until_state("sql", "draining"))["version"]
            await load(world, "other", world.adapter("a"))
            assert await watch.until_state("sql", "unloaded") == unloaded("sql", old)
            assert (await watch.until_state("other", "ready"))["version"] == old
            await load(world, "sql", world.adapter("a"))
            lease.release()
            assert (await watch.until_state("sql", "ready"))["version"] == old


async def test_the_stream_ends_with_the_server(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await load(world, "sql", world.adapter("a"))
        watch = Watch(world)
        await watch.until_state("sql", "ready")
        world.service.events.end()
        await until(lambda: world.service.events.num_readers == 0)
        await watch.leave()


def unloaded(name: str, version: str | None) -> dict[str, Any]:
    return {"object": "adapter", "name": name, "version": version, "state": "unloaded"}


async def test_aliases_are_no_adapters_that_went(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await load(world, "sql", world.adapter("a"))
        async with watching(world) as watch:
            await watch.until_state("sql", "ready")
            await world.client.put("/v1/aliases/best", json={"targets": [{"adapter": "sql"}]})
            await world.client.delete("/v1/aliases/best")
            await world.client.patch("/v1/adapters/sql", json={"priority": 1})
            assert (await watch.next())["name"] == "sql"


async def test_a_slow_reader_gets_the_last_state_and_costs_one_entry(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await load(world, "sql", world.adapter("a"))
        changes = world.service.events.changes()
        for priority in range(50):
            await world.client.patch("/v1/adapters/sql", json={"priority": priority})
        assert await changes.next() == "sql"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await changes.next()
        changes.close()


async def test_a_reader_that_never_got_a_byte_is_freed(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await Watch(world).leave()
        assert world.service.events.num_readers == 0
