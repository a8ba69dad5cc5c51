"""The catalogue goes away at every write of every operation: each leaves all as it was, and works again later."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from server.lifecycle import failed_loads
from server.lifecycle.adapter_service import AdapterService
from server.lifecycle.catalogue_errors import CatalogueUnavailable
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.control import WantedAdapter
from tests.server.lifecycle.service_world import ServiceWorld, adapter, service_world, until


@dataclass
class Scene:
    """Two adapters, the first replaced once, and an alias that was moved once."""

    world: ServiceWorld
    folder: Path
    new: str  # a source that was never loaded

    def facts(self) -> dict[str, Any]:
        """All that requests and operators can see, without times and revisions."""
        directory, registry = self.world.service.directory, self.world.service.registry
        records = {n: replace(r, revision=0, updated_at=0.0) for n, r in directory.records.items()}
        return {
            "records": records,
            "aliases": {n: replace(a, revision=0) for n, a in directory.aliases.items()},
            "names": {info.ref.name: info.ref.version for info in registry.list()},
            "jobs": list(self.world.service.loader.jobs),
            "on disk": self.world.on_disk(),
            "in memory": self.world.held(),
            "pinned": {v for v in self.world.held() if self.world.service.host._room.is_pinned(v)},
        }


@pytest_asyncio.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setattr(failed_loads, "_AGAIN_SECONDS", 0.02)
    async with service_world(tmp_path / "state") as world:
        await world.load("sql", adapter(tmp_path / "a"))
        await world.load("sql", adapter(tmp_path / "b", seed=1), load_inplace=True)
        await world.load("chat", adapter(tmp_path / "c", seed=2))
        await world.load("spare", adapter(tmp_path / "d", seed=3))
        await world.service.put_alias("prod", [AliasTarget(adapter="sql")])
        await world.service.put_alias("prod", [AliasTarget(adapter="sql"), AliasTarget(adapter="chat")])
        await world.service.keeper.settle()
        yield Scene(world, tmp_path, adapter(tmp_path / "new", seed=9))


Operation = Callable[[AdapterService, Scene], Awaitable[object]]


async def _submit(service: AdapterService, scene: Scene) -> None:
    """Nobody waits: whatever comes after the acknowledgement goes to the record."""
    await service.submit(WantedAdapter(name="fresh", source=scene.new, pin=True))


OPERATIONS: dict[str, tuple[int, Operation]] = {  # how often it writes, and what it is
    "load": (2, lambda service, scene: service.load("fresh", scene.new)),
    "replace": (2, lambda service, scene: service.load("sql", scene.new, load_inplace=True)),
    "load the same": (2, lambda service, scene: service.load("chat", str(scene.folder / "c"))),
    "same bytes, pinned": (
        1,
        lambda service, scene: service.apply(
            WantedAdapter(name="two", source=str(scene.folder / "c"), pin=True, managed_by="start")
        ),
    ),
    "reconcile": (
        1,
        lambda service, scene: service.apply(
            WantedAdapter(name="fresh", source=scene.new, pin=True, managed_by="start")
        ),
    ),
    "change": (1, lambda service, scene: service.changes.change("chat", pin=True, priority=3, ttl=60.0)),
    "roll back": (1, lambda service, scene: service.changes.rollback("sql")),
    "unload": (1, lambda service, scene: service.unload("spare")),
    "make an alias": (1, lambda service, scene: service.put_alias("canary", [AliasTarget(adapter="sql")])),
    "move an alias": (1, lambda service, scene: service.put_alias("prod", [AliasTarget(adapter="chat")])),
    "roll an alias back": (1, lambda service, scene: service.aliases.rollback("prod")),
    "remove an alias": (1, lambda service, scene: service.remove_alias("prod")),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", OPERATIONS)
async def test_each_write_failing_leaves_everything_as_it_was(scene: Scene, name: str) -> None:
    world, (num_writes, operation) = scene.world, OPERATIONS[name]
    before = scene.facts()
    for num_before in range(num_writes):
        world.catalogue.fail_after(num_before)
        with pytest.raises(CatalogueUnavailable):
            await operation(world.service, scene)
        world.catalogue.heal()
        await until(lambda: not any(r.pending for r in world.service.directory.records.values()))
        await world.check_settled()
        assert scene.facts() == before, f"after failing at write {num_before}"
    calls = len(world.catalogue.calls)
    await operation(world.service, scene)
    await world.check_settled()
    assert scene.facts() != before or name == "load the same"
    assert len(world.catalogue.calls) - calls == num_writes, "the operation writes more often than was tried"


@pytest.mark.asyncio
async def test_what_was_acknowledged_and_could_not_be_committed_is_told_in_the_record(scene: Scene) -> None:
    world = scene.world
    world.catalogue.fail_after(1)
    await _submit(world.service, scene)
    await until(lambda: "fresh" not in world.service.loader.jobs)
    assert world.record("fresh").pending is not None, "the record could not be written yet"
    world.catalogue.heal()
    await until(lambda: world.record("fresh").failure is not None)
    assert world.record("fresh").pending is None and world.state("fresh") == "failed"
    assert world.service.view.describe("fresh").to_dict()["failure"]["code"] == "catalogue_unavailable"
    await world.check_settled()
    await world.load("fresh", scene.new)
    assert world.record("fresh").failure is None and world.state("fresh") == "ready"


@pytest.mark.asyncio
async def test_an_unload_that_cannot_be_written_leaves_the_load_of_the_name_going_on(scene: Scene) -> None:
    world = scene.world
    world.reader.gate.clear()
    await _submit(world.service, scene)
    await until(lambda: world.service.loader.jobs["fresh"].stage == "validating")
    world.catalogue.fail_after(0)
    unloading = asyncio.create_task(world.service.unload("fresh"))
    await asyncio.sleep(0.01)
    world.reader.gate.set()
    with pytest.raises(CatalogueUnavailable):
        await unloading
    world.catalogue.heal()
    await until(lambda: "fresh" in world.service.registry)


@pytest.mark.asyncio
async def test_a_change_whose_caller_leaves_while_it_is_written_is_in_force_all_the_same(scene: Scene) -> None:
    """Durable or not: what memory says and what the catalogue says must not differ."""
    world, service = scene.world, scene.world.service
    loop = asyncio.get_running_loop()
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "change": lambda: service.changes.change("chat", pin=True),
        "rollback": lambda: service.changes.rollback("sql"),
        "unload": lambda: service.unload("spare"),
        "alias": lambda: service.put_alias("canary", [AliasTarget(adapter="chat")]),
        "remove alias": lambda: service.remove_alias("prod"),
    }
    for call in calls.values():
        task = asyncio.ensure_future(call())
        world.catalogue.on_write = lambda task=task: loop.call_soon_threadsafe(task.cancel)
        await asyncio.wait({task})
        world.catalogue.on_write = lambda: None
        snapshot = await asyncio.to_thread(world.catalogue._real.snapshot)
        assert dict(snapshot.adapters) == dict(service.directory.records)
        assert dict(snapshot.aliases) == dict(service.directory.aliases)
        await world.check_settled()
    assert service.host._room.is_pinned(world.record("chat").version)


@pytest.mark.asyncio
async def test_another_server_was_faster(scene: Scene) -> None:
    """Its change is not overwritten by who has not seen it."""
    world = scene.world
    theirs = replace(world.record("chat"), priority=7)
    await asyncio.to_thread(world.catalogue._real.put_adapter, theirs)
    await world.service.changes.change("chat", pin=True)  # tried again on top of theirs
    assert world.record("chat").pin and world.record("chat").priority == 7
    assert world.service.host._room.is_pinned(theirs.version)


@pytest.mark.asyncio
async def test_reads_go_on_while_the_catalogue_is_away(scene: Scene) -> None:
    world = scene.world
    world.catalogue.fail_after(0)
    assert await world.use("sql") == world.record("sql").version
    assert await world.use("prod", "user") in {world.record(name).version for name in ("sql", "chat")}
