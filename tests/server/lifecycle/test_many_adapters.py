"""Hundreds of names taken over at start: what is counted and listed in steps is what describing them all gives."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from server.lifecycle import adapter_view
from server.lifecycle.catalogue import Catalogue
from server.lifecycle.catalogue_records import AdapterRecord
from tests.server.lifecycle.restart_world import World, adapter_folder, serving

NUM_NAMES = 150


def named_like(record: AdapterRecord) -> Iterator[AdapterRecord]:
    for number in range(NUM_NAMES):
        yield replace(record, name=f"same-{number}", revision=0, priority=number)
        yield replace(record, name=f"failed-{number}", revision=0, version=None, failure=("code", "why"))


@pytest.mark.asyncio
async def test_thousands_are_counted_and_listed_as_they_are(tmp_path: Path) -> None:
    async with serving(tmp_path / "state") as world:
        await world.service.load("sql", adapter_folder(tmp_path / "sources", 0))
        await world.service.load("other", adapter_folder(tmp_path / "sources", 1))
    catalogue = Catalogue.open(world.state.catalogue_url)
    for record in named_like(catalogue.snapshot().adapters["sql"]):
        catalogue.put_adapter(record)
    catalogue.close()
    async with serving(tmp_path / "state") as world:
        assert 2 * NUM_NAMES > adapter_view._PER_TURN
        lease = world.service.acquire("other")
        assert lease is not None
        await world.service.ready(lease)
        await world.service.unload("other")
        await check_view(world)
        assert world.service.view.states() == {"registered": NUM_NAMES + 1, "failed": NUM_NAMES, "draining": 1}
        lease.release()
        lease = world.service.acquire("same-7")
        assert lease is not None
        await world.service.ready(lease)
        await check_view(world)
        assert world.service.view.states()["ready"] == NUM_NAMES + 1
        lease.release()
        world.service.check_integrity()


async def check_view(world: World) -> None:
    view = world.service.view
    assert [each async for each in view.each()] == list(view.list())
    assert view.states() == Counter(each.state.value for each in view.list())
    in_memory = [each for each in view.list() if each.record.version in world.service.host]
    resident = view.residency(0.0).adapters
    assert [(each.name, each.version) for each in resident] == [(e.name, e.record.version) for e in in_memory]
