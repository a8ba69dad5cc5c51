"""A disk that is full or broken while an adapter is loaded: a clear refusal, the name stays what it was, no litter."""

import errno
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy.exc import OperationalError

from adapters.errors import AdapterError
from server.errors import ServerError
from server.lifecycle.catalogue_names import NameChange
from server.lifecycle.control import WantedAdapter
from tests.server.lifecycle.restart_world import World, adapter_folder, serving, version_in

Break = Callable[[pytest.MonkeyPatch, int], None]


def break_write(patch: pytest.MonkeyPatch, number: int) -> None:
    """Of weights; SQLite writes past Python."""
    _fail(patch, "write", number)


def break_sync(patch: pytest.MonkeyPatch, number: int) -> None:
    _fail(patch, "fsync", number)


def break_rename(patch: pytest.MonkeyPatch, number: int) -> None:
    _fail(patch, "rename", number)


def _fail(patch: pytest.MonkeyPatch, call: str, number: int) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(f"adapters.durable_file.os.{call}", failing)


def break_catalogue(patch: pytest.MonkeyPatch, number: int) -> None:
    """As SQLite says it, in the middle of the transaction."""
    names = {errno.ENOSPC: ("SQLITE_FULL", "database or disk is full"), errno.EIO: ("SQLITE_IOERR", "disk I/O error")}

    def failing(*args: object) -> None:
        name, text = names[number]
        error = sqlite3.OperationalError(text)
        error.sqlite_errorname = name
        raise OperationalError("INSERT", {}, error)

    patch.setattr(NameChange, "_add_version", failing)


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with serving(tmp_path / "state") as world:
        yield world
        await world.settled()
        world.check_integrity()


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
@pytest.mark.parametrize("broken", [break_write, break_sync, break_rename, break_catalogue])
@pytest.mark.parametrize("is_there", [False, True], ids=["new", "replaced"])
async def test_a_load_that_cannot_be_kept(
    world: World, tmp_path: Path, broken: Break, number: int, is_there: bool
) -> None:
    service = world.service
    old, new = (adapter_folder(tmp_path / "sources", seed) for seed in (0, 1))
    if is_there:
        await service.load("sql", old)
    before, stored = service.directory.records.get("sql"), set(world.store.versions())
    with pytest.MonkeyPatch.context() as patch:
        broken(patch, number)
        with pytest.raises((AdapterError, ServerError)) as raised:
            await service.load("sql", new, load_inplace=True)
    assert raised.value.status == (503 if broken is break_catalogue else 507 if number == errno.ENOSPC else 500)
    assert str(tmp_path) in str(raised.value) and len(str(raised.value)) > 60, "says where, and what to do"
    await world.settled()
    after = service.directory.records.get("sql")
    assert (after and (after.version, after.pending, after.failure)) == (before and (before.version, None, None))
    assert set(world.store.versions()) == stored
    assert not list(world.state.path.rglob(".writing"))
    if is_there:
        lease = service.acquire("sql")
        assert lease is not None
        await service.ready(lease)
        assert lease.ref.version == version_in(old)
        lease.release()
    load = await service.load("sql", new, load_inplace=True)  # the disk is well again
    assert load.ref.version == version_in(new)


@pytest.mark.asyncio
async def test_what_cannot_be_announced_is_not_accepted(world: World, tmp_path: Path) -> None:
    """202 is a promise; without a durable record there is none."""
    source = adapter_folder(tmp_path / "sources", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NameChange, "put", _full)
        with pytest.raises(ServerError) as raised:
            await world.service.submit(WantedAdapter(name="sql", source=source))
    assert raised.value.status == 503
    assert not world.service.loader.jobs and not world.service.directory.records
    await world.service.load("sql", source)


@pytest.mark.asyncio
async def test_a_name_that_cannot_be_deleted_stays(world: World, tmp_path: Path) -> None:
    source = adapter_folder(tmp_path / "sources", 0)
    await world.service.load("sql", source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NameChange, "remove", _full)
        with pytest.raises(ServerError) as raised:
            await world.service.unload("sql")
    assert raised.value.status == 503
    lease = world.service.acquire("sql")
    assert lease is not None
    lease.release()
    await world.service.unload("sql")


def _full(*args: object) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = "SQLITE_FULL"
    raise OperationalError("INSERT", {}, error)
