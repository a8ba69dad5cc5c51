"""A name through its versions: replaced under leases, kept, asked for by digits, rolled back, shared, pinned, over."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from adapters.errors import AdapterCapacity, AdapterNotFound
from server.config import LoRALimits
from server.errors import ModelNotFound
from server.lifecycle import expiry
from server.lifecycle.catalogue_records import AdapterRecord, AliasTarget
from server.lifecycle.control import START_OWNER, WantedAdapter
from server.lifecycle.errors import NoPreviousVersion
from server.lifecycle.expiry import KEEP_FAILED_SECONDS, is_over
from tests.server.lifecycle.service_world import ServiceWorld, adapter, adapter_bytes, service_world, until


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[ServiceWorld]:
    async with service_world(tmp_path / "state") as world:
        yield world


async def replaced(world: ServiceWorld, folder: Path, count: int, name: str = "sql") -> list[str]:
    """The versions that the name stood for, the first to the last."""
    return [
        (await world.load(name, adapter(folder / f"{name}{seed}", seed=seed), load_inplace=True)).version
        for seed in range(count)
    ]


def is_pinned(world: ServiceWorld, version: str) -> bool:
    return world.service.host._room.is_pinned(version)  # type: ignore[arg-type]


# Replaced, kept, rolled back.


@pytest.mark.asyncio
async def test_a_name_keeps_the_last_two_versions_and_they_can_be_asked_for(
    world: ServiceWorld, tmp_path: Path
) -> None:
    versions = await replaced(world, tmp_path, 4)
    await world.service.keeper.settle()
    assert world.record("sql").previous == (versions[2], versions[1])
    assert world.held() == {versions[3]} and world.on_disk() == set(versions[1:])
    assert await world.use(f"sql@{versions[2]}") == versions[2]
    assert await world.use(f"org/base:sql@{versions[1][:8]}") == versions[1]
    assert await world.use("sql") == versions[3]
    for model in (f"sql@{versions[0]}", f"sql@{versions[2][:7]}", f"chat@{versions[2]}", "sql@", "@"):
        with pytest.raises(ModelNotFound):
            world.service.acquire(model)
    await world.service.keeper.settle()
    assert world.held() == {versions[3]}, "what was only asked for by its digits leaves memory after the request"


@pytest.mark.asyncio
async def test_rows_in_flight_finish_on_their_version_through_replace_and_rollback(
    world: ServiceWorld, tmp_path: Path
) -> None:
    old, new = await replaced(world, tmp_path, 2)
    on_new = world.lease("sql")
    before = world.service.changes.rollback("sql")
    assert (await before).version == old
    on_old = world.lease("sql")
    await world.service.ready(on_old)
    assert (on_new.ref.version, on_old.ref.version) == (new, old) and world.held() == {old, new}
    assert (await world.service.changes.rollback("sql")).version == new, "back again"
    assert world.record("sql").previous == (old,)
    on_new.release()
    await world.service.keeper.settle()
    assert world.held() == {old, new}
    on_old.release()
    await world.service.keeper.settle()
    assert world.held() == {new} and world.on_disk() == {old, new}


@pytest.mark.asyncio
async def test_rolling_back_names_the_source_of_what_it_went_back_to(world: ServiceWorld, tmp_path: Path) -> None:
    await replaced(world, tmp_path, 2)
    await world.service.changes.rollback("sql")
    assert world.record("sql").source == str(tmp_path / "sql0")


@pytest.mark.asyncio
@pytest.mark.parametrize("keep_versions", [0, 2])
async def test_there_is_no_way_back_from_the_first(tmp_path: Path, keep_versions: int) -> None:
    async with service_world(tmp_path / "state", keep_versions=keep_versions) as world:
        await replaced(world, tmp_path, 1 if keep_versions else 2)
        with pytest.raises(NoPreviousVersion):
            await world.service.changes.rollback("sql")
        with pytest.raises(AdapterNotFound):
            await world.service.changes.rollback("chat")


@pytest.mark.asyncio
async def test_a_version_that_an_alias_asks_for_is_kept_beyond_the_number(world: ServiceWorld, tmp_path: Path) -> None:
    versions = await replaced(world, tmp_path, 1)
    await world.service.put_alias("golden", [AliasTarget(adapter="sql", version=versions[0][:8])])  # type: ignore[arg-type]
    versions = await replaced(world, tmp_path, 5)
    assert world.record("sql").previous == (versions[3], versions[2], versions[0])
    assert await world.use("golden") == versions[0]


@pytest.mark.asyncio
@pytest.mark.parametrize("first", ["put_alias", "put_adapter"])
async def test_an_alias_made_while_a_replacement_is_written(tmp_path: Path, first: str) -> None:
    """Whichever the catalogue gets first, both were worked out before either was written."""
    async with service_world(tmp_path / "state", keep_versions=0) as world:
        (old,) = await replaced(world, tmp_path, 1)
        written, gate = world.catalogue.calls, threading.Event()
        world.catalogue.on_write = lambda: gate.wait(60)
        new = adapter(tmp_path / "new", seed=1)
        wanted = WantedAdapter(name="sql", source=new, load_inplace=True, managed_by=START_OWNER)  # one write
        changes = {
            "put_alias": lambda: world.service.put_alias("golden", [AliasTarget(adapter="sql", version=old)]),  # type: ignore[arg-type]
            "put_adapter": lambda: world.service.apply(wanted),
        }
        num_before = len(written)
        one = asyncio.create_task(changes.pop(first)())
        await until(lambda: written[num_before:] == [first])
        waiting = world.service.directory._thread._work_queue
        (change,) = changes.values()
        other = asyncio.create_task(change())
        await until(lambda: not waiting.empty())
        gate.set()
        ends = await asyncio.gather(one, other, return_exceptions=True)
        if first == "put_alias":
            assert not any(isinstance(end, BaseException) for end in ends), ends
            assert world.record("sql").previous == (old,) and await world.use("golden") == old
        else:
            assert isinstance(ends[1], AdapterNotFound) and "golden" not in world.service.directory.aliases
            assert world.record("sql").previous == ()


# Shared.


@pytest.mark.asyncio
async def test_the_same_bytes_under_two_names_are_one_version_in_memory_and_on_disk(
    world: ServiceWorld, tmp_path: Path
) -> None:
    first = await world.load("one", adapter(tmp_path / "a"))
    second = await world.load("two", adapter(tmp_path / "b"))
    assert first.version == second.version and world.held() == world.on_disk() == {first.version}
    assert [event for event in world.engine.events if event[0] == "load"] == [("load", first.version)]
    unloaded = await world.service.unload("one")
    assert unloaded.freed.host_bytes == 0 and not unloaded.is_draining, "the other name still has them"
    assert await world.use("two") == first.version
    assert (await world.service.unload("two")).freed.host_bytes == first.num_bytes


@pytest.mark.asyncio
async def test_one_name_keeps_what_another_stands_for(world: ServiceWorld, tmp_path: Path) -> None:
    old, new = await replaced(world, tmp_path, 2)
    await world.load("stable", str(tmp_path / "sql0"))
    assert world.held() == {old, new}
    await world.service.unload("stable")
    await world.service.keeper.settle()
    assert world.held() == {new} and world.on_disk() == {old, new}, "kept on disk, needed in memory by nobody"
    await world.service.unload("sql")
    await world.service.keeper.settle()
    assert world.on_disk() == set()


# Pins and priorities.


@pytest.mark.asyncio
async def test_settings_are_changed_one_by_one(world: ServiceWorld, tmp_path: Path) -> None:
    version = (await replaced(world, tmp_path, 1))[0]
    change = world.service.changes.change
    await change("sql", pin=True, ttl=600.0, priority=4)
    await change("sql", priority=5)
    record = world.record("sql")
    assert (record.pin, record.ttl, record.priority) == (True, 600.0, 5) and is_pinned(world, version)
    await change("sql", ttl=0, pin=False)
    assert (world.record("sql").pin, world.record("sql").ttl) == (False, None) and not is_pinned(world, version)
    with pytest.raises(AdapterNotFound):
        await change("chat", pin=True)


@pytest.mark.asyncio
async def test_a_pin_that_leaves_no_room_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    size = adapter_bytes(tmp_path)
    async with service_world(tmp_path / "state", limits=LoRALimits(cpu_lora_memory=2 * size)) as world:
        refs = [await world.load(f"n{seed}", adapter(tmp_path / str(seed), seed=seed)) for seed in range(3)]
        await world.service.changes.change("n0", pin=True)
        before = world.record("n1")
        with pytest.raises(AdapterCapacity, match="unpin another"):
            await world.service.changes.change("n1", pin=True, priority=9)
        assert world.record("n1") == before and not is_pinned(world, refs[1].version)
        for seed in (3, 4):
            await world.load(f"n{seed}", adapter(tmp_path / str(seed), seed=seed))
            assert refs[0].version in world.held(), "a pinned one never leaves"
        wanted = WantedAdapter(name="n5", source=adapter(tmp_path / "5", seed=5), pin=True, managed_by=START_OWNER)
        with pytest.raises(AdapterCapacity):
            await world.service.apply(wanted)
        await world.service.changes.change("n0", pin=False)
        await world.service.apply(wanted)


@pytest.mark.asyncio
async def test_a_higher_priority_is_evicted_later(tmp_path: Path) -> None:
    size = adapter_bytes(tmp_path)
    async with service_world(tmp_path / "state", limits=LoRALimits(cpu_lora_memory=2 * size)) as world:
        refs = [await world.load(f"n{seed}", adapter(tmp_path / str(seed), seed=seed)) for seed in range(2)]
        for _ in range(9):
            await world.use("n1")
        await world.service.changes.change("n0", priority=1)
        await world.load("n2", adapter(tmp_path / "2", seed=2))
        assert refs[0].version in world.held() and refs[1].version not in world.held()


@pytest.mark.asyncio
async def test_a_version_has_the_settings_of_the_names_that_stand_for_it_now(
    world: ServiceWorld, tmp_path: Path
) -> None:
    """Through sharing, replacing, rolling back and taking away."""
    old, new = await replaced(world, tmp_path, 2)
    await world.load("stable", str(tmp_path / "sql0"))
    await world.service.changes.change("sql", pin=True)
    assert is_pinned(world, new) and not is_pinned(world, old)
    lease = world.lease("sql")
    await world.service.changes.rollback("sql")
    assert is_pinned(world, old) and not is_pinned(world, new), "a replaced version is not pinned, though in use"
    lease.release()
    await world.load("sql", adapter(tmp_path / "third", seed=7), load_inplace=True)
    third = world.record("sql").version
    assert third is not None and is_pinned(world, third) and not is_pinned(world, old)
    await world.load("other", str(tmp_path / "third"))
    await world.service.unload("sql")
    assert third is not None and third in world.held() and not is_pinned(world, third), "who pinned it is gone"


# Time.


def test_when_the_time_of_a_name_is_over() -> None:
    version, now = "v", 1000.0

    def over(**fields: object) -> bool:
        return is_over(AdapterRecord(name="a", updated_at=now - 100, **fields), now)  # type: ignore[arg-type]

    assert not over(version=version) and not over(version=version, ttl=100.0) and over(version=version, ttl=99.0)
    assert not over(version=version, ttl=99.0, pending="a load under way"), "it is being renewed"
    assert not over(version=version, failure=("code", "a replacement that failed"))
    failed = AdapterRecord(name="a", updated_at=now, failure=("code", "why"))
    assert not is_over(failed, now + KEEP_FAILED_SECONDS) and is_over(failed, now + KEEP_FAILED_SECONDS + 1)
    assert over(failure=("code", "why"), ttl=99.0)


@pytest.mark.asyncio
async def test_a_name_goes_when_its_time_is_over_unless_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "SWEEP_SECONDS", 0.02)
    async with service_world(tmp_path / "state") as world:
        await world.load("stays", adapter(tmp_path / "a"))
        for name in ("goes", "aliased"):
            source = adapter(tmp_path / name, seed=len(name))
            await (await world.service.submit(WantedAdapter(name=name, source=source, ttl=0.5))).wait()
        await world.service.put_alias("prod", [AliasTarget(adapter="aliased")])
        lease = world.lease("goes")
        began = time.monotonic()
        await until(lambda: "goes" not in world.service.registry)
        assert time.monotonic() - began > 0.2
        assert lease.ref.version in world.held(), "requests under way finish"
        lease.release()
        await until(lambda: lease.ref.version not in world.on_disk())
        assert set(world.service.registry) == {"stays", "aliased"}, "an alias leads there, which is said in the log"
        await world.service.remove_alias("prod")
        await until(lambda: set(world.service.registry) == {"stays"})


@pytest.mark.asyncio
async def test_a_sweep_that_fails_goes_on(
    world: ServiceWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(expiry, "SWEEP_SECONDS", 0.001)
    records = {name: AdapterRecord(name=name, ttl=1.0, version="v") for name in "ab"}  # type: ignore[arg-type]
    removed: list[str] = []

    async def remove(name: str) -> None:
        removed.append(name)
        if name == "a":
            raise RuntimeError("nobody foresaw this")
        del records[name]

    task = asyncio.create_task(expiry.sweep_forever(records, remove))
    await until(lambda: removed.count("a") > 3)
    task.cancel()
    assert removed.count("b") == 1 and caplog.text.count("nobody foresaw this") == 1
