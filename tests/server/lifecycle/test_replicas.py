"""Two services on one catalogue: each sees what the other did, and nobody's change is half done or lost."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from adapters.errors import AdapterAlreadyLoaded, AdapterError, AdapterNotFound
from server.errors import ModelNotFound
from server.lifecycle import following
from server.lifecycle.catalogue import Catalogue
from server.lifecycle.catalogue_errors import CatalogueHistoryGone
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.control import WantedAdapter
from server.lifecycle.errors import AdapterLoadCancelled, AliasNotFound, NameConflict
from tests.server.lifecycle.restart_world import World, adapter_folder, serving, version_in

Pair = tuple[World, World]


@pytest_asyncio.fixture(params=["one state folder", "two"])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    """Both on one catalogue; with two state folders, each with a disk of its own."""
    url = f"sqlite:///{tmp_path}/catalogue.db"
    folders = ("a", "a") if request.param == "one state folder" else ("a", "b")
    async with (
        serving(tmp_path / folders[0], catalogue_url=url) as first,
        serving(tmp_path / folders[1], catalogue_url=url) as second,
    ):
        yield first, second
        for world in (first, second):
            await world.settled()
            await world.service.directory.refresh()
            world.service.check_integrity()


async def seen(is_so: Callable[[], bool]) -> float:
    """Seconds until it was."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < 60
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def served_version(world: World, name: str) -> str:
    lease = world.service.acquire(name)
    assert lease is not None
    await world.service.ready(lease)
    assert lease.ref.version in world.engine.host
    lease.release()
    return lease.ref.version


@pytest.mark.asyncio
async def test_what_one_does_the_other_serves(pair: Pair, tmp_path: Path) -> None:
    first, second = pair
    sources = [adapter_folder(tmp_path / "sources", seed) for seed in range(2)]
    for source in sources:
        await (await first.service.submit(WantedAdapter(name="sql", source=source))).wait()
        await seen(
            lambda wanted=source: (
                "sql" in second.service.registry
                and second.service.registry.describe("sql").ref.version == version_in(wanted)
            )
        )
        assert await served_version(second, "sql") == version_in(source)
    await first.service.put_alias("best", [AliasTarget(adapter="sql")])
    await seen(lambda: "best" in second.service.directory.aliases)
    assert await served_version(second, "best") == version_in(sources[1])
    await second.service.remove_alias("best")
    await second.service.unload("sql")
    await seen(lambda: "sql" not in first.service.directory.records)
    with pytest.raises(ModelNotFound):
        first.service.acquire("sql")


def priority_in(world: World) -> int | None:
    record = world.service.directory.records.get("sql")
    return None if record is None else record.priority


@pytest.mark.asyncio
async def test_a_change_is_seen_within_a_second(pair: Pair, tmp_path: Path) -> None:
    """Polling is four times a second; the bound is of time the loop had, which a stopped machine takes away."""
    first, second = pair
    await first.service.load("sql", adapter_folder(tmp_path / "sources", 0))
    waits = []
    for priority in range(1, 5):
        await first.service.changes.change("sql", priority=priority)
        waits.append(await seen(lambda now=priority: priority_in(second) == now))
    print(f"seen after {[round(wait, 2) for wait in waits]} s")
    assert min(waits) < 1.0


@pytest.mark.asyncio
async def test_both_load_one_name_at_once(pair: Pair, tmp_path: Path) -> None:
    """Other weights: one wins, the other is told; the same: both have it. Nothing is left pending."""
    for turn in range(6):
        sources = [adapter_folder(tmp_path / "sources", seed) for seed in (0, turn % 2)]
        name = f"adapter-{turn}"
        ends = await asyncio.gather(
            *(world.service.load(name, source) for world, source in zip(pair, sources, strict=True)),
            return_exceptions=True,
        )
        errors = [end for end in ends if isinstance(end, BaseException)]
        assert len(errors) == turn % 2 and all(isinstance(error, AdapterAlreadyLoaded) for error in errors), ends
        await asyncio.gather(*(world.service.directory.refresh() for world in pair))
        records = [world.service.directory.records[name] for world in pair]
        assert records[0] == records[1] and records[0].pending is None and records[0].failure is None
        assert {await served_version(world, name) for world in pair} == {records[0].version}


@pytest.mark.asyncio
async def test_changes_of_one_name_by_both_at_once(pair: Pair, tmp_path: Path) -> None:
    """Each is done on top of the other, or told why not."""
    sources = [adapter_folder(tmp_path / "sources", seed) for seed in range(3)]

    async def change(world: World, turn: int) -> None:
        wanted = WantedAdapter(name="sql", source=sources[turn % 3], priority=turn)
        if turn % 4 == 3:
            await world.service.unload("sql")
        elif turn % 4 == 2:
            await world.service.changes.change("sql", pin=bool(turn % 3))
        else:
            await (await world.service.submit(wanted)).wait()

    async def run(world: World, first: int) -> list[BaseException]:
        return [
            error
            for turn in range(first, first + 12)
            for error in await asyncio.gather(change(world, turn), return_exceptions=True)
            if error is not None
        ]

    errors = [error for each in await asyncio.gather(run(pair[0], 0), run(pair[1], 1)) for error in each]
    assert all(isinstance(e, AdapterNotFound | NameConflict | AdapterLoadCancelled) for e in errors), errors
    for world in pair:
        await world.settled()
        await world.service.directory.refresh()
    records = [world.service.directory.records.get("sql") for world in pair]
    assert records[0] == records[1]
    if records[0] is not None:
        assert records[0].pending is None
        assert {await served_version(world, "sql") for world in pair} == {records[0].version}


@pytest.mark.asyncio
async def test_an_alias_takes_no_name_that_the_other_gave_away(pair: Pair, tmp_path: Path) -> None:
    first, second = pair
    source = adapter_folder(tmp_path / "sources", 0)
    await first.service.load("sql", source)
    await second.service.directory.refresh()
    await first.service.load("new", source)
    with pytest.raises(NameConflict, match="is an adapter"):
        await second.service.put_alias("new", [AliasTarget(adapter="sql")])
    await first.service.put_alias("best", [AliasTarget(adapter="sql")])
    with pytest.raises(AdapterError, match="alias"):
        await second.service.load("best", source)


@pytest_asyncio.fixture
async def strangers(pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pair:
    """What one does the other learns only in the course of a change of its own. Both know `sql` and `other`."""
    first, second = pair
    monkeypatch.setattr(following, "POLL_SECONDS", 3600)
    await asyncio.sleep(0.5)  # the last look that was waited for already
    for seed, name in enumerate(("sql", "other")):
        await first.service.load(name, adapter_folder(tmp_path / "sources", seed))
    await second.service.directory.refresh()
    return pair


async def replace_sql(world: World, folder: Path, seeds: range) -> None:
    for seed in seeds:
        await world.service.load("sql", adapter_folder(folder, seed), load_inplace=True)


async def check_served_by_both(pair: Pair, alias: str, version: str) -> None:
    for world in pair:
        await world.service.directory.refresh()
        assert await served_version(world, alias) == version


@pytest.mark.asyncio
async def test_a_version_stays_that_an_alias_of_the_other_names(strangers: Pair, tmp_path: Path) -> None:
    first, second = strangers
    sources = tmp_path / "sources"
    version = version_in(adapter_folder(sources, 0))
    await second.service.put_alias("best", [AliasTarget(adapter="sql", version=version)])
    await replace_sql(first, sources, range(2, 6))
    kept = first.service.directory.records["sql"].previous
    assert kept == tuple(version_in(adapter_folder(sources, seed)) for seed in (4, 3, 0))
    await check_served_by_both(strangers, "best", version)


@pytest.mark.asyncio
async def test_a_name_stays_that_an_alias_of_the_other_leads_to(strangers: Pair, tmp_path: Path) -> None:
    first, second = strangers
    await second.service.put_alias("best", [AliasTarget(adapter="other")])
    with pytest.raises(NameConflict, match="the alias 'best' leads to 'other'; move or delete the alias first"):
        await first.service.unload("other")
    await check_served_by_both(strangers, "best", version_in(adapter_folder(tmp_path / "sources", 1)))
    await first.service.remove_alias("best")
    await first.service.unload("other")


@pytest.mark.asyncio
async def test_no_alias_leads_to_what_the_other_took_away(strangers: Pair, tmp_path: Path) -> None:
    """By putting it, by moving it, by rolling it back."""
    first, second = strangers
    version = version_in(adapter_folder(tmp_path / "sources", 0))
    await second.service.put_alias("best", [AliasTarget(adapter="other")])
    await second.service.put_alias("best", [AliasTarget(adapter="sql")])
    await first.service.directory.refresh()
    await replace_sql(first, tmp_path / "sources", range(2, 6))
    await first.service.unload("other")
    with pytest.raises(AdapterNotFound, match="neither is nor keeps a version"):
        await second.service.put_alias("old", [AliasTarget(adapter="sql", version=version)])
    await first.service.load("third", adapter_folder(tmp_path / "sources", 1))
    await second.service.directory.refresh()
    await first.service.unload("third")
    with pytest.raises(AdapterNotFound, match="no adapter is registered as 'third'"):
        await second.service.put_alias("best", [AliasTarget(adapter="third")])
    with pytest.raises(AdapterNotFound, match="no adapter is registered as 'other'"):
        await second.service.aliases.rollback("best")
    await check_served_by_both(strangers, "best", version_in(adapter_folder(tmp_path / "sources", 5)))


@pytest.mark.asyncio
async def test_a_rollback_to_what_the_other_took_away_a_moment_ago(strangers: Pair) -> None:
    first, second = strangers
    for name in ("other", "sql"):
        await second.service.put_alias("best", [AliasTarget(adapter=name)])
    await first.service.unload("other")
    with pytest.raises(AdapterNotFound, match="no adapter is registered as 'other'"):
        await second.service.aliases.rollback("best")


@pytest.mark.asyncio
async def test_an_alias_put_as_it_was_is_there_though_the_other_removed_it(strangers: Pair) -> None:
    first, second = strangers
    targets = [AliasTarget(adapter="other")]
    await second.service.put_alias("best", targets)
    await first.service.directory.refresh()
    await first.service.remove_alias("best")
    await second.service.put_alias("best", targets)
    await first.service.directory.refresh()
    assert first.service.aliases.get("best") == second.service.aliases.get("best")
    await first.service.remove_alias("best")
    await first.service.unload("other")
    with pytest.raises(AdapterNotFound):
        await second.service.put_alias("best", targets)
    with pytest.raises(AliasNotFound):
        second.service.aliases.get("best")


@pytest.mark.asyncio
async def test_history_that_is_gone_is_read_anew(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair
    source = adapter_folder(tmp_path / "sources", 0)
    for name in ("stays", "goes"):
        await first.service.load(name, source)
    await seen(lambda: "goes" in second.service.registry)

    def gone(catalogue: Catalogue, after: int) -> None:
        raise CatalogueHistoryGone("asked for what is forgotten")

    monkeypatch.setattr(Catalogue, "changes", gone)
    await first.service.unload("goes")
    await first.service.load("comes", adapter_folder(tmp_path / "sources", 1))
    await seen(lambda: {"stays", "comes"} == set(second.service.registry))
    second.service.check_integrity()


@pytest.mark.asyncio
async def test_a_name_that_only_the_other_can_serve(tmp_path: Path) -> None:
    """The base model of one is called as an adapter of the other; the rest is followed all the same."""
    url = f"sqlite:///{tmp_path}/catalogue.db"
    source = adapter_folder(tmp_path / "sources", 0)
    async with serving(tmp_path / "a", catalogue_url=url) as world:
        await world.service.load("sql", source)
        other = Catalogue.open(url)
        record = other.snapshot().adapters["sql"]
        other.put_adapter(replace(record, name="base", revision=0))
        other.put_adapter(replace(record, name="later", revision=0))
        other.close()
        await seen(lambda: "later" in world.service.registry)
        world.service.check_integrity()
        assert world.service.acquire("base") is None


@pytest.mark.asyncio
async def test_weights_that_are_not_here_come_from_their_source(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalogue.db"
    source = adapter_folder(tmp_path / "sources", 0)
    async with serving(tmp_path / "a", catalogue_url=url) as world:
        await world.service.load("sql", source)
    async with serving(tmp_path / "b", catalogue_url=url) as world:
        assert not world.store.versions()
        assert await served_version(world, "sql") == version_in(source)
        assert world.store.versions() == (version_in(source),)


@pytest.mark.asyncio
async def test_a_load_that_is_ended_before_its_first_step(tmp_path: Path) -> None:
    """The name is free, and whoever waits is told."""
    async with serving(tmp_path / "a") as world:
        service, source = world.service, adapter_folder(tmp_path / "sources", 0)
        job = await service.submit(WantedAdapter(name="sql", source=source))
        waiter = asyncio.create_task(job.wait())
        if job.task is not None:
            job.task.cancel()
        with pytest.raises((AdapterLoadCancelled, asyncio.CancelledError)):
            await waiter
        assert not service.loader.jobs
        await service.load("sql", source)
        assert await served_version(world, "sql") == version_in(source)
