"""What was acknowledged stays so: over a shutdown, in a name's last second, and with servers that hear of it later."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from adapters.adapter_ref import Lease
from adapters.errors import AdapterError
from server.errors import ModelNotFound, Unavailable
from server.lifecycle import expiry
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.control import FOLDER_OWNER, MISS_OWNER, START_OWNER, WantedAdapter
from server.lifecycle.errors import AdapterLoadCancelled
from server.lifecycle.sources.source_template import SourceTemplate
from server.lifecycle.unloading import StillWanted
from tests.server.lifecycle.service_world import ServiceWorld, adapter, service_world, until

SHUTS_DOWN = Unavailable("the server is shutting down")


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[ServiceWorld]:
    async with service_world(tmp_path / "state", keep_versions=0) as world:
        yield world


def wanted(source: str, **fields: object) -> WantedAdapter:
    return WantedAdapter(**{"name": "sql", "source": source, **fields})  # type: ignore[arg-type]


@pytest.mark.asyncio
@pytest.mark.parametrize("is_new", [True, False])
async def test_a_load_that_a_shutdown_ends_goes_on_at_the_next_start(tmp_path: Path, is_new: bool) -> None:
    source = adapter(tmp_path / "b", seed=1)
    async with service_world(tmp_path / "state", server_id="one") as world:
        if not is_new:
            await world.load("sql", adapter(tmp_path / "a"))
        world.engine.refuse = SHUTS_DOWN
        await world.service.submit(wanted(source, load_inplace=True, priority=3))
        await until(lambda: not world.service.loader.jobs)
        record = world.record("sql")
        assert record.pending is not None and record.failure is None
    async with service_world(tmp_path / "state", server_id="one") as world:
        await until(lambda: world.record("sql").pending is None)
        assert (world.record("sql").source, world.record("sql").priority) == (source, 3)
        assert await world.use("sql") == world.record("sql").version


@pytest.mark.asyncio
async def test_a_server_that_shuts_down_takes_no_loads(world: ServiceWorld, tmp_path: Path) -> None:
    world.engine.dead = SHUTS_DOWN
    with pytest.raises(Unavailable):
        await world.service.submit(wanted(adapter(tmp_path / "a")))
    assert not world.service.directory.records


@pytest.mark.asyncio
async def test_a_name_renewed_while_others_go_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiry, "SWEEP_SECONDS", 0.5)
    async with service_world(tmp_path / "state") as world:
        loop = asyncio.get_running_loop()
        source = adapter(tmp_path / "a")
        for name in ("aaa", "zzz"):
            await (await world.service.submit(wanted(source, name=name, ttl=0.1))).wait()
        renewed: list[asyncio.Future[None]] = []

        def renew() -> None:  # while the first of both is written away
            world.catalogue.on_write = lambda: None
            loop.call_soon_threadsafe(lambda: renewed.append(asyncio.ensure_future(changes.change("zzz", ttl=0.0))))
            time.sleep(0.1)

        changes = world.service.changes
        world.catalogue.on_write = renew
        await until(lambda: "aaa" not in world.service.registry)
        await asyncio.sleep(0.2)
        await asyncio.gather(*renewed)
        assert renewed and world.record("zzz").ttl is None and "zzz" in world.service.registry


@pytest.mark.asyncio
async def test_a_name_renewed_by_another_server_stays(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalogue.db"
    async with (
        service_world(tmp_path / "one", catalogue_url=url) as one,
        service_world(tmp_path / "two", catalogue_url=url) as two,
    ):
        await (await one.service.submit(wanted(adapter(tmp_path / "a"), ttl=0.3))).wait()
        await two.service.directory.refresh()
        await asyncio.sleep(0.3)
        await one.service.changes.change("sql", ttl=0.0)
        with pytest.raises((StillWanted, AdapterError)):
            await two.service._expire("sql")  # by a record that is not of now
        await one.service.directory.refresh()
        assert one.record("sql").ttl is None


@pytest.mark.asyncio
async def test_abort_ends_a_request_that_came_while_the_delete_was_written(world: ServiceWorld, tmp_path: Path) -> None:
    await world.load("sql", adapter(tmp_path / "a"))
    loop, late = asyncio.get_running_loop(), asyncio.Event()
    leases: list[Lease] = []

    def come() -> None:
        lease = world.lease("sql")
        lease.on_revoked = lambda: loop.call_later(0.01, lease.release)
        leases.append(lease)
        late.set()

    def on_write() -> None:
        asyncio.run_coroutine_threadsafe(_call(come), loop).result(10)

    world.catalogue.on_write = on_write
    unloaded = await world.service.unload("sql", abort=True)
    world.catalogue.on_write = lambda: None
    assert late.is_set() and leases[0].is_revoked and not leases[0].is_open
    assert not unloaded.is_draining


async def _call(come: Callable[[], None]) -> None:
    come()


@pytest.mark.asyncio
async def test_a_delete_by_one_server_ends_the_load_of_another(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalogue.db"
    sources = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    async with (
        service_world(tmp_path / "one", catalogue_url=url, server_id="one") as one,
        service_world(tmp_path / "two", catalogue_url=url, server_id="two") as two,
    ):
        one.reader.gate.clear()
        job = await one.service.submit(wanted(sources[0]))
        await until(lambda: "sql" in two.service.directory.records)
        await two.service.unload("sql")
        second = await two.service.submit(wanted(sources[1]))
        one.reader.gate.set()
        with pytest.raises(AdapterLoadCancelled, match="taken away by another server"):
            await job.wait()
        load = await second.wait()
        await asyncio.gather(one.service.directory.refresh(), two.service.directory.refresh())
        for each in (one, two):
            assert each.record("sql").version == load.ref.version and each.record("sql").failure is None


@pytest.mark.asyncio
async def test_a_server_that_starts_does_not_give_up_the_load_of_another(tmp_path: Path) -> None:
    """It may not see the source; whoever took the load on may."""
    url = f"sqlite:///{tmp_path}/catalogue.db"
    source = adapter(tmp_path / "seen" / "a")
    async with service_world(tmp_path / "one", catalogue_url=url, server_id="one") as one:
        one.reader.gate.clear()
        job = await one.service.submit(wanted(source))
        async with service_world(
            tmp_path / "two", catalogue_url=url, server_id="two", roots=(tmp_path / "two",)
        ) as two:
            await until(lambda: two.service.loader.num_of("api") == 0)
            assert two.record("sql").pending is not None and two.record("sql").failure is None
            one.reader.gate.set()
            load = await job.wait()
            await two.service.directory.refresh()
            assert two.record("sql").version == load.ref.version and two.record("sql").pending is None


@pytest.mark.asyncio
async def test_the_load_of_a_server_that_is_gone_is_done_by_the_next(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalogue.db"
    source = adapter(tmp_path / "a")
    async with service_world(tmp_path / "one", catalogue_url=url, server_id="one") as world:
        world.engine.refuse = SHUTS_DOWN
        await world.service.submit(wanted(source))
        await until(lambda: not world.service.loader.jobs)
    async with service_world(tmp_path / "two", catalogue_url=url, server_id="two") as world:
        await until(lambda: "sql" in world.service.registry)
        assert world.record("sql").pending is None


@pytest.mark.asyncio
async def test_a_file_removed_by_another_server_just_before_the_commit_is_there_after_it(
    world: ServiceWorld, tmp_path: Path
) -> None:
    def remove() -> None:
        for version in world.store.versions():
            world.store.remove(version)

    world.catalogue.on_write = remove
    ref = await world.load("sql", adapter(tmp_path / "a"))
    world.catalogue.on_write = lambda: None
    assert world.store.versions() == (ref.version,)


# Whose a name is, and what it is set to.


@pytest.mark.asyncio
async def test_a_load_that_says_nothing_of_a_setting_leaves_it(world: ServiceWorld, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=1)
    changes = world.service.changes
    await (await world.service.submit(changes.asked("sql", first, pin=True, ttl=900.0, priority=5))).wait()
    for source, load_inplace in ((first, False), (second, True)):
        await world.load("sql", source, load_inplace=load_inplace)
        record = world.record("sql")
        assert (record.pin, record.ttl, record.priority) == (True, 900.0, 5)
    await (await world.service.submit(changes.asked("sql", second, pin=False, priority=0))).wait()
    assert (world.record("sql").pin, world.record("sql").priority) == (False, 0)


@pytest.mark.asyncio
async def test_the_same_bytes_again_take_no_name_from_its_owner(world: ServiceWorld, tmp_path: Path) -> None:
    source, copy = adapter(tmp_path / "a"), adapter(tmp_path / "copy")
    for owner, after in ((FOLDER_OWNER, FOLDER_OWNER), (START_OWNER, START_OWNER), (MISS_OWNER, "api")):
        await (await world.service.submit(wanted(source, name=owner, managed_by=owner))).wait()
        await world.load(owner, copy)
        assert world.service.owner_of(owner) == after
    await world.load(FOLDER_OWNER, adapter(tmp_path / "b", seed=1), load_inplace=True)
    assert world.service.owner_of(FOLDER_OWNER) == "api", "given other weights on purpose"


@pytest.mark.asyncio
async def test_a_start_goes_on_although_an_alias_keeps_what_it_names_no_more(
    world: ServiceWorld, tmp_path: Path
) -> None:
    await world.service.apply(wanted(adapter(tmp_path / "a"), managed_by=START_OWNER))
    await world.service.put_alias("best", [AliasTarget(adapter="sql")])
    await world.service.forget_start([])
    assert "sql" in world.service.registry


@pytest.mark.asyncio
async def test_a_miss_never_takes_the_base_s_name(tmp_path: Path) -> None:
    adapter(tmp_path / "places" / "org" / "base")
    adapter(tmp_path / "places" / "alias", seed=1)
    template = SourceTemplate(f"{tmp_path}/places/{{name}}")
    async with service_world(tmp_path / "state", template=template) as world:
        for name in ("org/base:org/base", "alias:alias", "org/base:alias"):
            with pytest.raises((ModelNotFound, AdapterError)):
                await world.service.resolve(name)
        assert not world.service.directory.records and not world.service.view.list()
