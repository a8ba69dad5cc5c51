"""Taking names away: drained, aborted, by a deadline; what it frees, what refuses it, and an engine that is gone."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from adapters.adapter_facts import AdapterFacts
from adapters.adapter_ref import Lease
from adapters.device_room import DeviceNeed
from adapters.errors import AdapterCapacity, AdapterNotFound
from server.engine.request import EngineStats
from server.errors import ModelNotFound, Unavailable
from server.lifecycle import unloading, unused_versions
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.errors import NameConflict
from tests.server.lifecycle.service_world import READ, ServiceWorld, adapter, service_world, until

ROW_BYTES = 1000


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[ServiceWorld]:
    async with service_world(tmp_path / "state", row_bytes=ROW_BYTES) as world:
        yield world


def request(lease: Lease) -> Lease:
    """As a generation does: told to end, it gives the lease back a little later."""
    lease.on_revoked = lambda: asyncio.get_running_loop().call_later(0.01, lease.release)
    return lease


@pytest.mark.asyncio
async def test_it_says_what_was_freed_once_it_is(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    world.engine.stats = EngineStats(active_versions=(ref.version,))
    unloaded = await world.service.unload("sql")
    assert ref.version not in world.held() and ref.version not in world.on_disk()
    assert unloaded.to_dict() == {
        "object": "adapter",
        "name": "sql",
        "version": ref.version,
        "state": "unloaded",
        "deleted": True,
        "freed": {"host_bytes": ref.num_bytes, "device_bytes": ref.lora_rank * ROW_BYTES},
    }


@pytest.mark.asyncio
async def test_what_it_took_of_the_device_beside_the_pools_is_freed_too(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    world.engine.stats = EngineStats(active_versions=(ref.version,))
    need = DeviceNeed(num_rows=1, num_extra_bytes=77)
    world.engine.facts[ref.version] = AdapterFacts(need=need)
    assert world.service.device.num_bytes(ref.version) == ROW_BYTES + 77
    freed = (await world.service.unload("sql")).freed
    assert freed.device_bytes == ROW_BYTES + 77 and world.service.device.num_bytes(ref.version) == 0


@pytest.mark.asyncio
async def test_drain_returns_at_once_and_frees_later(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    lease = world.lease("sql")
    unloaded = await world.service.unload("sql")
    assert unloaded.is_draining and unloaded.to_dict()["state"] == "draining"
    assert (unloaded.freed.host_bytes, unloaded.freed.device_bytes) == (0, 0)
    assert not lease.is_revoked and world.held() == {ref.version}
    (draining,) = world.service.view.list()
    assert (draining.state, draining.name, draining.to_dict()["leases"]) == ("draining", "sql", 1)
    with pytest.raises(ModelNotFound):
        world.service.acquire("sql")
    lease.release()
    await world.service.keeper.settle()
    assert world.held() == world.on_disk() == set() and not world.service.view.list()


@pytest.mark.asyncio
async def test_abort_ends_requests_and_frees(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    leases = [request(world.lease("sql")) for _ in range(3)]
    other = await world.load("other", adapter(tmp_path / "b", seed=1))
    untouched = world.lease("other")
    unloaded = await world.service.unload("sql", abort=True)
    assert all(lease.is_revoked and not lease.is_open for lease in leases)
    assert not unloaded.is_draining and unloaded.freed.host_bytes == ref.num_bytes
    assert not untouched.is_revoked and world.held() == {other.version}
    untouched.release()


@pytest.mark.asyncio
async def test_abort_ends_those_on_older_versions_of_the_name_too(world: ServiceWorld, tmp_path: Path) -> None:
    await world.load("sql", adapter(tmp_path / "a"))
    old = request(world.lease("sql"))
    await world.load("sql", adapter(tmp_path / "b", seed=1), load_inplace=True)
    await world.load("twin", str(tmp_path / "a"))
    twin = world.lease("twin")
    await world.service.unload("sql", abort=True)
    assert old.is_revoked and not twin.is_revoked, "who came by another name to the same version is left alone"
    twin.release()


@pytest.mark.asyncio
async def test_a_deadline_lets_them_finish_and_then_ends_them(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    quick, slow = request(world.lease("sql")), request(world.lease("sql"))
    asyncio.get_running_loop().call_later(0.05, quick.release)
    unloaded = await world.service.unload("sql", deadline=0.3)
    assert not quick.is_revoked and slow.is_revoked and not slow.is_open
    assert unloaded.freed.host_bytes == ref.num_bytes


@pytest.mark.asyncio
async def test_all_done_before_the_deadline_is_not_waited_out(world: ServiceWorld, tmp_path: Path) -> None:
    await world.load("sql", adapter(tmp_path / "a"))
    lease = world.lease("sql")
    unload = asyncio.create_task(world.service.unload("sql", deadline=1000.0))
    await until(lambda: "sql" not in world.service.registry)
    lease.release()
    unloaded = await asyncio.wait_for(unload, 100)
    assert not lease.is_revoked and not unloaded.is_draining


@pytest.mark.asyncio
async def test_a_request_that_does_not_end_is_said_to_drain(
    world: ServiceWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unloading, "_REVOKED_SECONDS", 0.05)
    await world.load("sql", adapter(tmp_path / "a"))
    deaf = world.lease("sql")
    unloaded = await world.service.unload("sql", abort=True)
    assert unloaded.is_draining and deaf.is_revoked
    deaf.release()


@pytest.mark.asyncio
async def test_a_delete_whose_caller_leaves_is_done_all_the_same(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    lease = world.lease("sql")
    unload = asyncio.create_task(world.service.unload("sql", deadline=1000.0))
    await until(lambda: "sql" not in world.service.registry)
    unload.cancel()
    await asyncio.wait({unload})
    lease.release()
    await world.service.keeper.settle()
    assert ref.version not in world.held()


@pytest.mark.asyncio
async def test_what_an_alias_leads_to_stays(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    await world.service.put_alias("prod", [AliasTarget(adapter="sql")])
    with pytest.raises(NameConflict, match="'prod' leads to 'sql'"):
        await world.service.unload("sql", abort=True)
    assert await world.use("prod") == ref.version
    await world.service.remove_alias("prod")
    await world.service.unload("sql")


@pytest.mark.asyncio
async def test_what_an_alias_led_to_before_goes(world: ServiceWorld, tmp_path: Path) -> None:
    """Rolling the alias back is refused then; that it could be is no reason to keep the weights."""
    ref = await world.load("sql", adapter(tmp_path / "a"))
    await world.load("chat", adapter(tmp_path / "b", seed=1))
    await world.service.put_alias("prod", [AliasTarget(adapter="sql", version=ref.version)])
    await world.service.put_alias("prod", [AliasTarget(adapter="chat")])
    unloaded = await world.service.unload("sql")
    assert unloaded.freed.host_bytes == ref.num_bytes
    assert ref.version not in world.held() and ref.version not in world.on_disk()
    with pytest.raises(AdapterNotFound):
        await world.service.aliases.rollback("prod")
    assert await world.use("prod") == world.record("chat").version


@pytest.mark.asyncio
async def test_a_refused_delete_does_not_end_the_load_under_way(world: ServiceWorld, tmp_path: Path) -> None:
    await world.load("sql", adapter(tmp_path / "a"))
    await world.service.put_alias("prod", [AliasTarget(adapter="sql")])
    world.reader.gate.clear()
    loading = asyncio.create_task(world.service.load("sql", adapter(tmp_path / "b", seed=1), load_inplace=True))
    await until(lambda: world.service.loader.jobs.get("sql") is not None)
    with pytest.raises(NameConflict):
        await world.service.unload("sql")
    world.reader.gate.set()
    assert (await loading).outcome == "replaced"


@pytest.mark.asyncio
async def test_an_alias_made_while_its_target_goes_never_leads_nowhere(world: ServiceWorld, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a")
    for turn in range(8):
        await world.load("sql", source)
        tasks = [world.service.unload("sql"), world.service.put_alias("prod", [AliasTarget(adapter="sql")])]
        ends = await asyncio.gather(*(tasks if turn % 2 else reversed(tasks)), return_exceptions=True)
        errors = [end for end in ends if isinstance(end, BaseException)]
        assert len(errors) == 1 and isinstance(errors[0], NameConflict | AdapterNotFound), ends
        assert ("prod" in world.service.directory.aliases) == ("sql" in world.service.registry)
        if "prod" in world.service.directory.aliases:
            await world.service.remove_alias("prod")


@pytest.mark.asyncio
async def test_64_deletes_of_one_name_are_one(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    ends = await asyncio.gather(*(world.service.unload("sql") for _ in range(64)), return_exceptions=True)
    done = [end for end in ends if not isinstance(end, BaseException)]
    assert len(done) == 1 and done[0].freed.host_bytes == ref.num_bytes
    assert all(isinstance(end, AdapterNotFound) for end in ends if isinstance(end, BaseException))


# What nothing leads to.


@pytest.mark.asyncio
async def test_weights_that_a_crash_left_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of a load that has written them and not yet its record."""
    monkeypatch.setattr(unused_versions, "SWEEP_SECONDS", 0.05)
    left = READ(Path(adapter(tmp_path / "left", seed=5))).model
    async with service_world(tmp_path / "state") as world:
        world.store.put(left)
        ref = await world.load("sql", adapter(tmp_path / "a"))
        await until(lambda: left.version not in world.on_disk())
        assert world.on_disk() == {ref.version}


# An engine that refuses, and one that is gone.


@pytest.mark.asyncio
async def test_an_engine_that_refuses_a_load_leaves_nothing(world: ServiceWorld, tmp_path: Path) -> None:
    world.engine.refuse = AdapterCapacity("the engine has other ideas")
    with pytest.raises(AdapterCapacity):
        await world.service.load("sql", adapter(tmp_path / "a"))
    world.engine.refuse = None
    await world.check_settled()
    assert not world.service.directory.records and world.on_disk() == set()
    await world.load("sql", adapter(tmp_path / "a"))


@pytest.mark.asyncio
async def test_an_engine_that_dies_hangs_nobody(tmp_path: Path) -> None:
    async with service_world(tmp_path / "state", cold_timeout=60.0) as world:
        ref = await world.load("sql", adapter(tmp_path / "a"))
        await world.load("sql", adapter(tmp_path / "b", seed=1), load_inplace=True)
        await world.service.keeper.settle()
        lease = world.lease("sql")
        world.engine.dead = Unavailable("the engine is not running")
        with pytest.raises(Unavailable):
            await world.use(f"sql@{ref.version}")
        with pytest.raises(Unavailable):
            await world.service.load("new", adapter(tmp_path / "c", seed=2))
        unloaded = await asyncio.wait_for(world.service.unload("sql"), 60)
        assert unloaded.is_draining
        lease.release()
        await asyncio.wait_for(world.service.keeper.settle(), 60)
        assert not world.service.directory.records
