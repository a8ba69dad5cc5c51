"""Loads that are accepted: once for all who ask the same, in turn for those who ask otherwise; and how they fail."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from adapters.errors import AdapterAlreadyLoaded, AdapterNotFound, AdapterRefused
from server.lifecycle.catalogue_errors import CatalogueConflict
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.control import FILE_OWNER, FOLDER_OWNER, MISS_OWNER, START_OWNER, WantedAdapter
from server.lifecycle.errors import AdapterFailed, AdapterLoadCancelled, NameConflict
from server.lifecycle.load_job import wait_at_most
from server.lifecycle.sources.errors import AdapterSourceNotAllowed
from tests.adapters.hostile import write_config
from tests.server.lifecycle.service_world import ServiceWorld, adapter, service_world, until


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[ServiceWorld]:
    async with service_world(tmp_path / "state") as world:
        yield world


def wanted(source: str, name: str = "sql", **options: object) -> WantedAdapter:
    return WantedAdapter(name=name, source=source, **options)  # type: ignore[arg-type]


def broken(folder: Path) -> str:
    source = adapter(folder)
    write_config(folder, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "layer_replication": [[0, 2]]})
    return source


@pytest.mark.asyncio
async def test_a_load_is_durable_when_it_is_acknowledged_and_seen_on_its_way(
    world: ServiceWorld, tmp_path: Path
) -> None:
    world.reader.gate.clear()
    job = await world.service.submit(wanted(adapter(tmp_path / "a"), pin=True, ttl=600.0, priority=2))
    snapshot = await asyncio.to_thread(world.catalogue._real.snapshot)
    assert snapshot.adapters["sql"] == world.record("sql") and world.record("sql").pending is not None
    record = world.record("sql")
    assert (record.version, record.pin, record.ttl, record.priority) == (None, True, 600.0, 2)
    assert world.state("sql") in ("fetching", "validating")
    await until(lambda: world.state("sql") == "validating")
    described = world.service.view.describe("sql").to_dict()
    assert described["pending"] == job.wanted.source and described["version"] is None
    assert "sql" not in world.service.registry
    world.reader.gate.set()
    load = await job.wait()
    assert load.outcome == "loaded" and world.state("sql") == "ready"
    assert world.record("sql").pending is None and world.record("sql").version == load.ref.version
    assert await job.wait() == load, "who asks later is told too"


@pytest.mark.asyncio
async def test_64_racers_with_the_same_wish_are_one_load(world: ServiceWorld, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a")
    jobs = await asyncio.gather(*(world.service.submit(wanted(source)) for _ in range(64)))
    assert len(set(map(id, jobs))) == 1
    loads = await asyncio.gather(*(job.wait() for job in jobs))
    assert len({(load.ref, load.outcome) for load in loads}) == 1
    assert world.reader.num_reads == 1 and world.catalogue.calls == ["put_adapter"] * 2
    again = await world.service.submit(wanted(source))
    assert (await again.wait()).outcome == "unchanged"


@pytest.mark.asyncio
async def test_64_racers_with_8_wishes_leave_one_of_them(world: ServiceWorld, tmp_path: Path) -> None:
    sources = [adapter(tmp_path / str(seed), seed=seed) for seed in range(8)]
    loads = await asyncio.gather(
        *(world.service.load("sql", sources[i % 8], load_inplace=True) for i in range(64)), return_exceptions=True
    )
    assert not [load for load in loads if isinstance(load, BaseException)]
    assert world.reader.num_reads == 8
    assert world.record("sql").source in sources and len(world.record("sql").previous) == 2
    await world.check_settled()
    assert world.held() == {world.record("sql").version}


@pytest.mark.asyncio
async def test_the_same_wish_joins_one_that_waits_for_its_turn(world: ServiceWorld, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=1)
    world.reader.gate.clear()
    running = await world.service.submit(wanted(first))
    queued = [asyncio.create_task(world.service.submit(wanted(second))) for _ in range(8)]
    await until(lambda: world.reader.num_reads == 1)
    assert world.service.loader.jobs["sql"] is running and not any(task.done() for task in queued)
    assert world.service.loader.sources() == {first, second}, "an upload that waits must not be swept away"
    world.reader.gate.set()
    jobs = await asyncio.gather(*queued)
    assert len(set(map(id, jobs))) == 1
    assert (await jobs[0].wait()).outcome == "replaced" and world.reader.num_reads == 2


@pytest.mark.asyncio
async def test_whoever_is_cancelled_while_asking_leaves_the_load_to_the_others(
    world: ServiceWorld, tmp_path: Path
) -> None:
    """And nothing that says a load is under way when none is."""
    source = adapter(tmp_path / "a")
    loop = asyncio.get_running_loop()
    first = asyncio.create_task(world.service.submit(wanted(source)))
    world.catalogue.on_write = lambda: loop.call_soon_threadsafe(first.cancel)
    second = asyncio.create_task(world.service.submit(wanted(source)))
    await asyncio.wait({first, second})
    assert first.cancelled()
    assert (await second.result().wait()).outcome == "loaded" and world.reader.num_reads == 1
    assert world.record("sql").pending is None


@pytest.mark.asyncio
async def test_what_can_be_told_at_once_is_and_changes_nothing(world: ServiceWorld, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a")
    await world.load("sql", source)
    calls = len(world.catalogue.calls)
    with pytest.raises(AdapterSourceNotAllowed):
        await world.service.submit(wanted("https://example.org/x", "other"))
    assert len(world.catalogue.calls) == calls and not world.service.loader.jobs


@pytest.mark.asyncio
async def test_a_failed_first_load_is_visible_when_nobody_waited(world: ServiceWorld, tmp_path: Path) -> None:
    await world.service.submit(wanted(broken(tmp_path / "a")))
    await until(lambda: not world.service.loader.jobs)
    description = world.service.view.describe("sql").to_dict()
    assert description["state"] == "failed" and description["failure"]["code"] == "adapter_unsupported"
    assert "layer_replication" in description["failure"]["why"] and description["pending"] is None
    with pytest.raises(AdapterFailed, match="adapter_unsupported"):
        await world.use("sql")
    await world.load("sql", adapter(tmp_path / "b"))
    assert world.state("sql") == "ready" and world.record("sql").failure is None


@pytest.mark.asyncio
async def test_a_failed_first_load_is_gone_when_its_asker_was_told(world: ServiceWorld, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused):
        await world.service.load("sql", broken(tmp_path / "a"))
    assert not world.service.directory.records and not world.service.view.list()
    await world.check_settled()
    assert world.on_disk() == set() == world.held()


@pytest.mark.asyncio
async def test_a_request_that_was_told_is_not_the_operator(world: ServiceWorld, tmp_path: Path) -> None:
    """Whoever asked for the load polls for its end; that a client's request met the failure tells him nothing."""
    world.reader.gate.clear()
    source = broken(tmp_path / "a")
    await world.service.submit(wanted(source))
    request = asyncio.create_task(world.use("sql"))
    await asyncio.sleep(0.01)
    world.reader.gate.set()
    with pytest.raises(AdapterFailed):
        await request
    assert world.state("sql") == "failed"


@pytest.mark.asyncio
async def test_who_stopped_waiting_is_not_told_and_the_record_is(world: ServiceWorld, tmp_path: Path) -> None:
    world.reader.gate.clear()
    job = await world.service.submit(wanted(broken(tmp_path / "a")))
    assert await wait_at_most(job, 0.0) is None
    world.reader.gate.set()
    await until(lambda: not world.service.loader.jobs)
    assert world.state("sql") == "failed"
    with pytest.raises((AdapterNotFound, AdapterRefused)):
        await job.wait()


@pytest.mark.asyncio
async def test_who_stops_waiting_while_the_failure_is_recorded_is_not_told_either(
    world: ServiceWorld, tmp_path: Path
) -> None:
    world.reader.gate.clear()
    job = await world.service.submit(wanted(broken(tmp_path / "a")))
    asker = asyncio.create_task(wait_at_most(job, 0.2))
    await asyncio.sleep(0)
    recording = threading.Event()
    world.catalogue.on_write = lambda: recording.wait(10)
    world.reader.gate.set()
    assert await asker is None
    recording.set()
    await until(lambda: not world.service.loader.jobs)
    assert world.state("sql") == "failed"


@pytest.mark.asyncio
@pytest.mark.parametrize("is_waiting", [True, False])
async def test_a_failed_replacement_leaves_the_old_version(
    world: ServiceWorld, tmp_path: Path, is_waiting: bool
) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    before = world.record("sql")
    job = await world.service.submit(wanted(broken(tmp_path / "b")))
    if is_waiting:
        with pytest.raises(AdapterRefused):
            await job.wait()
    await until(lambda: not world.service.loader.jobs)
    after = world.record("sql")
    assert (after.version, after.source, after.previous) == (ref.version, before.source, before.previous)
    assert after.pending is None and world.state("sql") == "ready"
    assert (after.failure is None) == is_waiting
    assert await world.use("sql") == ref.version


@pytest.mark.asyncio
@pytest.mark.parametrize("owner", [FILE_OWNER, FOLDER_OWNER])
async def test_a_reconciler_s_failure_stays_for_whoever_looks(world: ServiceWorld, tmp_path: Path, owner: str) -> None:
    with pytest.raises(AdapterRefused):
        await world.service.apply(wanted(broken(tmp_path / "a"), managed_by=owner))
    assert world.state("sql") == "failed" and world.service.owner_of("sql") == owner
    assert set(world.service.managed(owner)) == {"sql"}
    await world.service.apply(wanted(adapter(tmp_path / "b"), managed_by=owner))
    assert world.state("sql") == "ready" and world.record("sql").failure is None


@pytest.mark.asyncio
async def test_a_reconciler_does_not_take_another_s_name(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    other = adapter(tmp_path / "b", seed=1)
    for owner in (FILE_OWNER, FOLDER_OWNER):
        with pytest.raises(AdapterAlreadyLoaded, match="managed by api"):
            await world.service.apply(wanted(other, managed_by=owner))
    assert world.service.registry.describe("sql").ref == ref
    await world.service.apply(wanted(other, managed_by=START_OWNER))
    assert world.service.owner_of("sql") == START_OWNER


@pytest.mark.asyncio
async def test_what_an_earlier_start_named_goes(world: ServiceWorld, tmp_path: Path) -> None:
    for name in ("a", "b"):
        await world.service.apply(wanted(adapter(tmp_path / name), name, managed_by=START_OWNER))
    await world.load("c", adapter(tmp_path / "a"))
    await world.service.forget_start(["b"])
    assert set(world.service.registry) == {"b", "c"}


@pytest.mark.asyncio
async def test_a_load_on_miss_does_not_take_the_settings_of_a_load_on_purpose(
    world: ServiceWorld, tmp_path: Path
) -> None:
    source = adapter(tmp_path / "a")
    world.reader.gate.clear()
    purpose = await world.service.submit(wanted(source, pin=True, priority=5))
    miss = asyncio.create_task(world.service.loader.submit(wanted(source, managed_by=MISS_OWNER, load_inplace=False)))
    await asyncio.sleep(0)
    world.reader.gate.set()
    await purpose.wait()
    assert (await (await miss).wait()).outcome == "unchanged"
    record = world.record("sql")
    assert (record.managed_by, record.pin, record.priority) == ("api", True, 5) and world.reader.num_reads == 1


@pytest.mark.asyncio
async def test_a_name_is_an_adapter_s_or_an_alias_s(world: ServiceWorld, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a")
    await world.load("sql", source)
    await world.service.put_alias("prod", [AliasTarget(adapter="sql")])
    with pytest.raises(NameConflict):
        await world.service.submit(wanted(source, "prod"))
    with pytest.raises(NameConflict):
        await world.service.put_alias("sql", [AliasTarget(adapter="sql")])
    ends = await asyncio.gather(
        world.service.load("both", source),
        world.service.put_alias("both", [AliasTarget(adapter="sql")]),
        return_exceptions=True,
    )
    assert len([end for end in ends if isinstance(end, CatalogueConflict | NameConflict)]) == 1
    assert ("both" in world.service.directory.records) != ("both" in world.service.directory.aliases)


# Ending a load.


@pytest.mark.asyncio
@pytest.mark.parametrize("turns", range(6))
async def test_a_load_can_be_ended_at_any_turn_and_its_name_is_free_again(
    world: ServiceWorld, tmp_path: Path, turns: int
) -> None:
    """Also before its task took its first step."""
    source = adapter(tmp_path / "a")
    asking = [asyncio.create_task(world.service.load("sql", source, managed_by="start")) for _ in range(3)]
    for _ in range(turns):
        await asyncio.sleep(0)
    await world.service.loader.cancel("sql")
    ends = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 60)
    assert all(isinstance(end, AdapterLoadCancelled) or end.outcome == "loaded" for end in ends)  # type: ignore[union-attr]
    assert not world.service.loader.jobs
    assert (await asyncio.wait_for(world.service.load("sql", source), 60)).ref.name == "sql"


@pytest.mark.asyncio
async def test_a_delete_ends_the_load_and_those_that_wait_behind_it(world: ServiceWorld, tmp_path: Path) -> None:
    world.reader.gate.clear()
    running = await world.service.submit(wanted(adapter(tmp_path / "a")))
    queued = asyncio.create_task(world.service.submit(wanted(adapter(tmp_path / "b", seed=1))))
    await until(lambda: world.reader.num_reads == 1)
    unloading = asyncio.create_task(world.service.unload("sql"))
    with pytest.raises(AdapterLoadCancelled):
        await queued
    world.reader.gate.set()  # a folder is not closed under who reads it, so the end of the read is waited for
    with pytest.raises(AdapterLoadCancelled):
        await running.wait()
    unloaded = await unloading
    assert unloaded.ref is None and not unloaded.is_draining
    await world.check_settled()
    assert world.reader.num_reads == 1 and not world.service.directory.records and not world.on_disk()


@pytest.mark.asyncio
async def test_close_ends_what_runs_and_what_waits(tmp_path: Path) -> None:
    async with service_world(tmp_path / "state") as world:
        world.reader.gate.clear()
        running = await world.service.submit(wanted(adapter(tmp_path / "a")))
        queued = asyncio.create_task(world.service.submit(wanted(adapter(tmp_path / "b", seed=1))))
        await until(lambda: world.reader.num_reads == 1)
        closing = asyncio.create_task(world.service.loader.close())
        with pytest.raises(AdapterLoadCancelled):
            await queued
        world.reader.gate.set()
        with pytest.raises(AdapterLoadCancelled):
            await running.wait()
        await closing
        assert world.reader.num_reads == 1
