"""Names, files and engine stay in step: on success, on every failure, under races and while requests hold on.

What only this service can do (versions kept, aliases, tiers, restarts, replicas) is in the files beside this one.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from adapters.checkpoint import LoadedAdapter
from adapters.errors import (
    AdapterAlreadyLoaded,
    AdapterCapacity,
    AdapterError,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterRefused,
)
from server.config import AdapterConfig, LoRALimits
from server.engine.request import EngineStats
from server.errors import ModelNotFound, Unavailable
from server.lifecycle.assembly import allowed_roots
from server.lifecycle.errors import AdapterLoadCancelled
from server.lifecycle.sources.errors import AdapterSourceNotAllowed
from tests.adapters.hostile import write_config
from tests.server.fakes import FakeAdapterEngine
from tests.server.lifecycle.service_world import (
    BASES,
    READ,
    ServiceWorld,
    adapter,
    adapter_bytes,
    service_world,
    until,
)


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[ServiceWorld]:
    async with service_world(tmp_path / "state") as world:
        yield world


@pytest.mark.asyncio
async def test_load_describe_unload(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    assert ref.name == "sql" and ref.lora_rank == 4 and ref.source == str(tmp_path / "a")
    assert world.held() == {ref.version}
    described = world.service.view.describe("sql").to_dict()
    assert described["version"] == ref.version
    assert (described["state"], described["tier"], described["leases"]) == ("ready", "host", 0)
    assert described["modules"] == ["q_proj", "v_proj"]
    assert described["last_used"] is None
    world.engine.stats = EngineStats(active_versions=(ref.version,))
    assert world.service.view.describe("sql").tier == "device"
    await world.service.unload("sql")
    assert world.held() == set()
    assert not world.service.view.list()
    with pytest.raises(AdapterNotFound):
        world.service.view.describe("sql")


@pytest.mark.asyncio
async def test_same_bytes_again_change_nothing(world: ServiceWorld, tmp_path: Path) -> None:
    """But the record: it says where the name was last loaded from."""
    first = await world.service.load("sql", adapter(tmp_path / "a"))
    copy = await world.service.load("sql", adapter(tmp_path / "b"))
    assert copy.ref.source == world.record("sql").source == str(tmp_path / "b")
    inplace = await world.service.load("sql", adapter(tmp_path / "a"), load_inplace=True)
    assert (first.outcome, copy.outcome, inplace.outcome) == ("loaded", "unchanged", "unchanged")
    assert copy.ref.version == first.ref.version and inplace.ref == first.ref
    assert world.engine.events == [("load", first.ref.version)]
    assert world.record("sql").previous == ()


@pytest.mark.asyncio
async def test_other_bytes_need_load_inplace(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    with pytest.raises(AdapterAlreadyLoaded, match="has already been loaded"):
        await world.service.load("sql", adapter(tmp_path / "b", seed=1))
    assert world.service.registry.describe("sql").ref == ref
    assert world.engine.events == [("load", ref.version)]


@pytest.mark.asyncio
@pytest.mark.parametrize("keep_versions", [0, 2])
async def test_replaced_version_lives_until_its_last_lease(tmp_path: Path, keep_versions: int) -> None:
    """In memory; on disk a name may keep it for longer, and then it does not drain: it can be asked for."""
    async with service_world(tmp_path / "state", keep_versions=keep_versions) as world:
        old = await world.load("sql", adapter(tmp_path / "a"))
        leases = [world.lease("sql"), world.lease("sql")]
        load = await world.service.load("sql", adapter(tmp_path / "b", seed=1), load_inplace=True)
        new = load.ref
        assert load.outcome == "replaced" and new.version != old.version
        assert world.lease("sql").ref.version == new.version
        assert [each.ref.version for each in leases] == [old.version] * 2
        states = [a.to_dict()["state"] for a in world.service.view.list()]
        assert states == (["ready"] if keep_versions else ["ready", "draining"])
        leases[0].release()
        await world.service.keeper.settle()
        assert world.held() == {old.version, new.version}
        leases[1].release()
        await world.service.keeper.settle()
        assert world.held() == {new.version}
        assert world.on_disk() == ({old.version, new.version} if keep_versions else {new.version})


@pytest.mark.asyncio
async def test_unload_takes_the_name_at_once_and_drains(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("sql", adapter(tmp_path / "a"))
    lease = world.lease("sql")
    await world.service.unload("sql")
    with pytest.raises(ModelNotFound):
        world.service.acquire("sql")
    with pytest.raises(AdapterNotFound):
        await world.service.unload("sql")
    assert world.held() == {ref.version}
    lease.release()
    await world.service.keeper.settle()
    assert world.held() == set()


@pytest.mark.asyncio
async def test_a_version_with_two_names_outlives_one_of_them(world: ServiceWorld, tmp_path: Path) -> None:
    ref = await world.load("one", adapter(tmp_path / "a"))
    await world.service.load("two", adapter(tmp_path / "a"))
    await world.service.unload("one")
    await world.service.keeper.settle()
    assert world.held() == {ref.version}
    assert world.engine.events == [("load", ref.version)]


@pytest.mark.asyncio
@pytest.mark.parametrize("delay", range(5))
async def test_loading_again_what_is_about_to_be_freed_keeps_it(
    world: ServiceWorld, tmp_path: Path, delay: int
) -> None:
    """The last lease is released `delay` turns of the loop after the file is read, so that freeing the version falls
    before, between and behind the steps of loading it again: the name must find its weights in every case.
    """
    folder = adapter(tmp_path / "a")
    ref = await world.load("sql", folder)
    lease = world.lease("sql")
    await world.service.unload("sql")
    loop = asyncio.get_running_loop()

    def release(turns: int) -> None:
        if turns:
            loop.call_soon(release, turns - 1)
        else:
            lease.release()

    world.reader.on_read = lambda: loop.call_soon_threadsafe(release, delay)
    await world.service.load("again", folder)
    while lease.is_open:
        await asyncio.sleep(0)
    await world.service.keeper.settle()
    assert world.held() == {ref.version}


@pytest.mark.asyncio
@pytest.mark.parametrize("moment", ["before the record is written", "while the record is written"])
async def test_freeing_that_starts_while_the_load_is_handed_over_keeps_it(
    world: ServiceWorld, tmp_path: Path, moment: str
) -> None:
    """The worst moments: the last lease goes when engine and disk have the version and no name has it yet."""
    folder = adapter(tmp_path / "a")
    ref = await world.load("sql", folder)
    lease = world.lease("sql")
    await world.service.unload("sql")
    loop = asyncio.get_running_loop()

    class ReleasesWhenLookedAt(LoadedAdapter):
        def __getattribute__(self, name: str) -> object:
            if name == "report":  # read on the loop, between the engine and the record
                lease.release()
            return super().__getattribute__(name)

    if moment.startswith("before"):
        loaded = READ(Path(folder))
        world.reader.replacement = ReleasesWhenLookedAt(loaded.model, loaded.report)
    else:
        world.catalogue.on_write = lambda: loop.call_soon_threadsafe(lease.release)
    await world.service.load("again", folder)
    assert not lease.is_open
    await world.service.keeper.settle()
    assert world.held() == {ref.version} == world.on_disk()


@pytest.mark.asyncio
async def test_racing_loads_of_one_name_have_one_winner(world: ServiceWorld, tmp_path: Path) -> None:
    same = adapter(tmp_path / "same")
    others = [adapter(tmp_path / f"other{seed}", seed=seed) for seed in range(1, 4)]
    sources = [same, *others, same, same]
    results = await asyncio.gather(*(world.service.load("sql", source) for source in sources), return_exceptions=True)
    outcomes = [r.outcome if not isinstance(r, BaseException) else type(r).__name__ for r in results]
    loads = [r for r in results if not isinstance(r, BaseException)]
    assert len({load.ref for load in loads if load.outcome == "loaded"}) == 1, "callers of one load share its end"
    assert set(outcomes) <= {"loaded", "unchanged", "AdapterAlreadyLoaded"}
    assert world.reader.num_reads == len(set(sources))
    await world.check_settled()
    assert len(world.held()) == 1


@pytest.mark.asyncio
async def test_random_traffic_leaves_names_and_engine_in_step(world: ServiceWorld, tmp_path: Path) -> None:
    """Loads, replacements, unloads and leases of three names over four versions, all at once."""
    folders = [adapter(tmp_path / str(seed), seed=seed) for seed in range(4)]

    async def client(number: int) -> None:
        for step in range(12):
            name = f"n{(number + step) % 3}"
            try:
                if (number + step) % 4 == 0:
                    await world.service.unload(name)
                else:
                    await world.service.load(name, folders[(number * 5 + step) % 4], load_inplace=step % 2 == 0)
                lease = world.lease(name)
                await world.service.ready(lease)
                assert lease.ref.version in world.held()
                await asyncio.sleep(0)
                assert lease.ref.version in world.held()
                lease.release()
            except (AdapterError, ModelNotFound):
                pass

    await asyncio.gather(*(client(number) for number in range(6)))
    await world.check_settled()
    assert [event for event in world.engine.events if event[0] == "unload"]


@pytest.mark.asyncio
async def test_a_refused_folder_leaves_nothing(world: ServiceWorld, tmp_path: Path) -> None:
    folder = Path(adapter(tmp_path / "a"))
    write_config(folder, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "layer_replication": [[0, 2]]})
    with pytest.raises(AdapterRefused) as refused:
        await world.service.load("sql", str(folder))
    assert "layer_replication" in str(refused.value)
    assert "sql" not in world.service.registry
    assert world.engine.events == []
    assert b'adapter_loads_total{model_name="org/base",result="refused"} 1.0' in world.metrics.render()


@pytest.mark.asyncio
async def test_a_full_engine_leaves_the_old_version_serving(world: ServiceWorld, tmp_path: Path) -> None:
    """The engine's own limit, behind the host tier's."""
    old = await world.load("sql", adapter(tmp_path / "a"))
    world.engine.host.max_bytes = world.engine.host.num_bytes
    with pytest.raises(AdapterCapacity):
        await world.service.load("sql", adapter(tmp_path / "b", seed=1), load_inplace=True)
    assert world.service.registry.describe("sql").ref == old
    await world.check_settled()
    assert world.on_disk() == {old.version}


@pytest.mark.asyncio
async def test_what_never_fits_leaves_the_old_version_serving(tmp_path: Path) -> None:
    """Room in host memory is the host tier's: what is not in use makes way, what is larger than all is refused."""
    limits = LoRALimits(cpu_lora_memory=adapter_bytes(tmp_path))
    async with service_world(tmp_path / "state", limits=limits) as world:
        old = await world.load("sql", adapter(tmp_path / "a"))
        lease = world.lease("sql")
        with pytest.raises(AdapterCapacity, match="restart with a larger --cpu-lora-memory"):
            await world.service.load("sql", adapter(tmp_path / "b", seed=1, r=5), load_inplace=True)
        await world.service.keeper.settle()
        assert world.service.registry.describe("sql").ref == old and world.on_disk() == {old.version}
        lease.release()
        other = await world.load("other", adapter(tmp_path / "c", seed=2))
        assert world.held() == {other.version} and world.on_disk() == {old.version, other.version}


@pytest.mark.asyncio
async def test_an_unforeseen_failure_of_the_engine_is_cleaned_up(tmp_path: Path) -> None:
    """The engine took the weights and then failed: they must go again."""

    class Half(FakeAdapterEngine):
        async def load_adapter(self, model):
            await super().load_adapter(model)
            raise RuntimeError("the reply was lost")

    engine = Half()
    async with service_world(tmp_path / "state", engine=engine) as world:
        with pytest.raises(RuntimeError, match="lost"):
            await world.service.load("sql", adapter(tmp_path / "a"))
        await world.service.keeper.settle()
        assert [kind for kind, _ in engine.events] == ["load", "unload"]
        assert world.on_disk() == set() and "sql" not in world.service.directory.records
        assert b'result="failed"} 1.0' in world.metrics.render()


@pytest.mark.asyncio
async def test_a_load_goes_on_when_its_caller_is_cancelled(world: ServiceWorld, tmp_path: Path) -> None:
    """It was acknowledged, or somebody else may wait for it too; what ends it is `cancel` (below)."""
    world.reader.gate.clear()
    loading = asyncio.create_task(world.service.load("sql", adapter(tmp_path / "a")))
    await until(lambda: world.reader.num_reads == 1)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    world.reader.gate.set()
    await until(lambda: "sql" in world.service.registry)
    await world.check_settled()
    assert len(world.held()) == 1


@pytest.mark.asyncio
async def test_a_cancelled_load_leaves_nothing(world: ServiceWorld, tmp_path: Path) -> None:
    """But the note that it was accepted, for the next start: an unload, which cancels, takes that away."""
    world.reader.gate.clear()
    loading = asyncio.create_task(world.service.load("sql", adapter(tmp_path / "a")))
    await until(lambda: world.reader.num_reads == 1)
    cancelling = asyncio.create_task(world.service.loader.cancel("sql"))
    await asyncio.sleep(0.01)
    world.reader.gate.set()
    await cancelling
    with pytest.raises(AdapterLoadCancelled):
        await loading
    await world.check_settled()
    assert world.held() == set() == world.on_disk()
    assert "sql" not in world.service.registry and not world.service.loader.jobs
    await world.service.load("sql", adapter(tmp_path / "a"))


@pytest.mark.asyncio
async def test_a_dead_engine_does_not_hang_leases(world: ServiceWorld, tmp_path: Path) -> None:
    await world.service.load("sql", adapter(tmp_path / "a"))
    lease = world.lease("sql")
    world.engine.dead = Unavailable("the engine is not running")
    await world.service.unload("sql")
    lease.release()
    await world.service.keeper.settle()
    with pytest.raises(Unavailable):
        await world.service.load("sql", adapter(tmp_path / "a"))


@pytest.mark.asyncio
@pytest.mark.parametrize("source", ["", "nowhere", "a\0b", "x" * 5000])
async def test_no_folder_there(world: ServiceWorld, source: str) -> None:
    with pytest.raises(AdapterNotFound):
        await world.service.load("sql", source)
    assert not world.service.directory.records


@pytest.mark.asyncio
async def test_a_url_is_a_source_now_and_needs_to_be_allowed(world: ServiceWorld) -> None:
    with pytest.raises(AdapterSourceNotAllowed):
        await world.service.load("sql", "s3://bucket/x")
    assert not world.catalogue.calls


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["", "../x", "a b", "x" * 200, *BASES])
async def test_names_are_checked_before_any_file_is_touched(world: ServiceWorld, name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterNameInvalid):
        await world.service.load(name, adapter(tmp_path / "a"))
    assert world.reader.num_reads == 0


@pytest.mark.asyncio
async def test_allowed_roots(tmp_path: Path) -> None:
    inside, outside = adapter(tmp_path / "in" / "a"), adapter(tmp_path / "out" / "a")
    (tmp_path / "in" / "link").symlink_to(outside)
    async with service_world(tmp_path / "state", roots=(tmp_path / "in",)) as world:
        for source in (outside, str(tmp_path / "in" / ".." / "out" / "a"), str(tmp_path / "in" / "link")):
            with pytest.raises(AdapterSourceNotAllowed):
                await world.service.load("sql", source)
        assert world.reader.num_reads == 0
        await world.service.load("sql", inside)
        await world.service.unload("sql")


def test_what_the_command_line_names_is_allowed(tmp_path: Path) -> None:
    """Samples and --lora-modules lie where they lie, also with --allowed-roots."""
    config = AdapterConfig(allowed_roots=(Path("/srv"),), adapter_dir=Path("/watched"))
    assert allowed_roots(config, [Path("/mine")]) == (Path("/srv"), Path("/watched"), Path("/mine"))
    assert allowed_roots(AdapterConfig(), [Path("/mine")]) == (), "any folder"


@pytest.mark.asyncio
async def test_what_model_may_say(world: ServiceWorld, tmp_path: Path) -> None:
    for number, name in enumerate(("sql", "org/sql:x", "v1:sql")):
        await world.service.load(name, adapter(tmp_path / str(number), seed=number))
    acquire = world.service.acquire
    assert [acquire(base) for base in BASES] == [None, None, None]
    for model, name in {
        "sql": "sql",
        "alias:sql": "sql",
        "org/base:sql": "sql",
        "org/base:v1:sql": "sql",  # the longest base name first …
        "org/base:v1:v1:sql": "v1:sql",
        "alias:v1:sql": "v1:sql",
        "org/sql:x": "org/sql:x",
        "org/base:org/sql:x": "org/sql:x",
    }.items():
        lease = world.lease(model)
        assert lease.ref.name == name, model
        lease.release()
    await world.service.unload("sql")
    assert world.lease("org/base:v1:sql").ref.name == "v1:sql"  # … then the shorter ones
    for model in ("", "SQL", "org/base:", "alias:alias", ":sql", "org/base:sql", "other:v1:sql", "sql "):
        with pytest.raises(ModelNotFound) as missing:
            acquire(model)
        assert missing.value.param == "model"


@pytest.mark.asyncio
async def test_a_miss_names_the_base_and_near_misses_only(world: ServiceWorld, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a")
    for name in ("billing-sql", "acme-secret"):
        await world.service.load(name, source)
    with pytest.raises(ModelNotFound) as missing:
        world.service.acquire("biling-sql")
    assert "`biling-sql` does not exist" in missing.value.message
    assert "`billing-sql`" in missing.value.message and "`org/base`" in missing.value.message
    assert "acme" not in missing.value.message
    with pytest.raises(ModelNotFound) as hostile:
        world.service.acquire("\x1b[31m" + "x" * 100_000)
    assert "\x1b" not in hostile.value.message and len(hostile.value.message) < 500


@pytest.mark.asyncio
async def test_gauges_tell_running_from_waiting(world: ServiceWorld, tmp_path: Path) -> None:
    refs = {}
    for seed, name in enumerate(("runs", "waits", "idle")):
        refs[name] = await world.load(name, adapter(tmp_path / name, seed=seed, r=4 + seed))
    leases = [world.lease("runs"), world.lease("waits")]
    runs, waits = refs["runs"].version, refs["waits"].version
    world.engine.stats = EngineStats(running_versions=(runs,), waiting_versions=(waits,), active_versions=(runs,))
    world.metrics.observe_step(world.engine.stats)
    text = world.metrics.render().decode()
    labels = 'engine="0",max_lora="10",model_name="org/base",running_lora_adapters="runs",waiting_lora_adapters="waits"'
    assert sample(text, f"vllm:lora_requests_info{{{labels}}}") == pytest.approx(time.time(), abs=60)
    assert sample(text, 'vllm:lora_adapter_loaded{adapter_name="runs",engine="0",level="gpu",') == 1
    assert sample(text, 'vllm:lora_adapter_loaded{adapter_name="idle",engine="0",level="cpu",') == 1
    assert sample(text, "vllm:num_gpu_loaded_lora_adapters") == 1
    assert sample(text, "vllm:num_cpu_loaded_lora_adapters") == 3
    assert sample(text, "vllm:max_gpu_lora_adapters") == 64 // 6
    assert sample(text, "vllm:lora_adapter_load_seconds_count") == 3
    await world.service.unload("runs")  # its requests go on, and it is still said to run
    draining = world.metrics.render().decode()
    assert 'running_lora_adapters="runs"' in draining
    assert 'lora_adapter_loaded{adapter_name="runs"' not in draining
    for lease in leases:
        lease.release()


def sample(text: str, start: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return float(line.rpartition(" ")[2])
