"""A put that fails or dies at any system call leaves no file that is not whole, and what was there before."""

import errno
import fcntl
import gc
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from adapters.durable_file import ASIDE, writing_in
from adapters.errors import VersionStoreFailed, VersionStoreFull
from adapters.version_store import VersionStore
from tests.adapters.version_samples import (
    KEY,
    SYSTEM_CALLS,
    assert_same,
    model_of,
    owner_of,
    put_and_die,
    put_together,
    put_until_killed,
    version_of,
)

REFUSED = {
    errno.ENOSPC: VersionStoreFull,
    errno.EDQUOT: VersionStoreFull,
    errno.EIO: VersionStoreFailed,
    errno.EACCES: VersionStoreFailed,
}
NUM_KILLS = 20


class Calls:
    """Counts the system calls of a put and lets one fail. Those of threads that other tests left are not its own."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.thread = threading.get_ident()
        self.names: list[str] = []
        self.fail_at: int | None = None
        self.number = 0
        for name in SYSTEM_CALLS:
            patch.setattr(owner_of(name), name, self._counted(name, getattr(owner_of(name), name)))

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            is_unlock = name == "flock" and args[1] == fcntl.LOCK_UN
            if is_unlock or threading.get_ident() != self.thread:
                return original(*args, **kwargs)
            self.names.append(name)
            if len(self.names) - 1 == self.fail_at:
                raise OSError(self.number, os.strerror(self.number))
            return original(*args, **kwargs)

        return call

    def of(self, put: Callable[[], object], fail_at: int | None = None, number: int = 0) -> list[str]:
        self.names, self.fail_at, self.number = [], fail_at, number
        try:
            put()
        finally:
            self.fail_at = None
        return self.names


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    gc.collect()  # files of other tests that are removed when nobody holds them
    gc.disable()
    yield Calls(monkeypatch)
    gc.enable()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / KEY).iterdir()}


@pytest.mark.parametrize("number", REFUSED, ids=errno.errorcode.get)
def test_a_put_that_fails_anywhere_leaves_what_was_there(tmp_path: Path, calls: Calls, number: int) -> None:
    store = VersionStore(tmp_path, base_key=KEY)
    num_bytes = store.put(model_of(0))
    sequence = list(calls.of(lambda: store.put(model_of(1))))
    assert sequence.count("write") >= 2 and [sequence.count(name) for name in ("fsync", "rename")] == [2, 1]
    store.remove(version_of(1))
    optional = {place for place, name in enumerate(sequence) if name == "unlink"}
    for place in range(len(sequence)):
        with pytest.raises(REFUSED[number]) as caught:
            calls.of(lambda: store.put(model_of(1)), place, number)
        assert version_of(1) not in store and names_in(tmp_path) <= {".lock", f"{version_of(0)}.safetensors"}, place
        for named in (str(tmp_path / KEY), f"{num_bytes} bytes are needed", "are free", errno.errorcode[number]):
            assert named in str(caught.value)
        assert store.num_bytes == num_bytes
        assert_same(store.read(version_of(0)), model_of(0))
        store.check_integrity()
    assert len(optional) == 1
    assert (caught.value.status, caught.value.code) in {(507, "adapter_storage_full"), (500, "adapter_storage_failed")}
    store.put(model_of(1))
    assert_same(store.read(version_of(1)), model_of(1))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_replacing_a_damaged_file_fails_the_same_way(tmp_path: Path, calls: Calls, number: int) -> None:
    """The damaged one stays, or the whole new one is there: when only its folder was not flushed."""
    store = VersionStore(tmp_path, base_key=KEY)
    store.put(model_of(1))
    (path,) = (tmp_path / KEY).glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    sequence = list(calls.of(lambda: store.put(model_of(1))))
    renamed = sequence.index("rename")
    for place in range(len(sequence)):
        path.write_bytes(whole[:-1])
        with pytest.raises(REFUSED[number]):
            calls.of(lambda: store.put(model_of(1)), place, number)
        assert path.read_bytes() == (whole[:-1] if place <= renamed else whole), sequence[place]
        assert names_in(tmp_path) == {".lock", path.name}


def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short writes, byte by byte near the end, then ENOSPC; and nothing can be removed either."""
    store = VersionStore(tmp_path, base_key=KEY)
    write, unlink, room = os.write, os.unlink, 5000

    def short(descriptor: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "full")
        count = write(descriptor, data[: max(1, room // 2)])
        room -= count
        return count

    def refused(path: Path) -> None:
        raise OSError(errno.EIO, "no") if path.exists() else FileNotFoundError

    monkeypatch.setattr(os, "write", short)
    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(VersionStoreFull, match="Make room"):
        store.put(model_of(1))
    assert (names_in(tmp_path), store.versions(), store.num_bytes) == ({".lock", ASIDE}, (), 0)
    monkeypatch.setattr(os, "unlink", unlink)
    room = 1 << 30
    store.put(model_of(1))
    assert_same(store.read(version_of(1)), model_of(1))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_made(tmp_path: Path, calls: Calls, number: int) -> None:
    sequence = list(calls.of(lambda: VersionStore(tmp_path / "first", base_key=KEY)))
    for place in range(len(sequence)):
        folder = tmp_path / str(place)
        with pytest.raises((VersionStoreFull, VersionStoreFailed), match="cannot open"):
            calls.of(partial(VersionStore, folder, base_key=KEY), place, number)
        assert VersionStore(folder, base_key=KEY).versions() == ()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / KEY).write_text("")
    with pytest.raises(VersionStoreFailed, match="ENOTDIR"):
        VersionStore(tmp_path, base_key=KEY)


def test_a_folder_taken_away_is_made_again(tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "state", base_key=KEY)
    (tmp_path / "state").rename(tmp_path / "away")
    store.put(model_of(1))
    assert_same(store.read(version_of(1)), model_of(1))


# Processes


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Children of a process that has imported torch once, and has no other threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.adapters.version_samples"])
    return context


def test_killed_at_any_moment(tmp_path: Path, processes: ForkServerContext) -> None:
    """20 writers, each killed somewhere: all that they said was stored is there, and all that is there is whole."""
    chance, said = random.Random(7), []
    for turn in range(NUM_KILLS):
        ours, theirs = processes.Pipe(duplex=False)
        writer = processes.Process(target=put_until_killed, args=(tmp_path, theirs, 1000 * turn))
        writer.start()
        theirs.close()
        said.append(ours.recv())
        time.sleep(chance.uniform(0, 0.05))
        writer.kill()
        writer.join()
        while True:
            try:
                said.append(ours.recv())
            except EOFError:
                break
        store = VersionStore(tmp_path, base_key=KEY)
        assert ASIDE not in names_in(tmp_path) and {version_of(number) for number in said} <= set(store.versions())
        store.check_integrity()
    assert len(store.versions()) <= len(said) + NUM_KILLS  # of each writer at most one it had no time to tell
    known = {
        version_of(1000 * turn + number): 1000 * turn + number for turn in range(NUM_KILLS) for number in range(999)
    }
    for version in store.versions():
        assert_same(store.read(version), model_of(known[version], width=20_000))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_system_call(tmp_path: Path, processes: ForkServerContext, after: bool) -> None:
    leftovers, stored = 0, 0
    for call in range(1, 100):
        writer = processes.Process(target=put_and_die, args=(tmp_path, call, call, after))
        writer.start()
        writer.join()
        leftovers += ASIDE in names_in(tmp_path)
        store = VersionStore(tmp_path, base_key=KEY)
        assert ASIDE not in names_in(tmp_path)
        if version_of(call) in store:
            stored += 1
            assert_same(store.read(version_of(call)), model_of(call))
        store.put(model_of(call))
        assert_same(store.read(version_of(call)), model_of(call))
        store.check_integrity()
        if writer.exitcode == 0:
            break
    assert writer.exitcode == 0 and call > 10 and leftovers >= 4 and stored >= 3


def test_the_same_version_by_several_at_once(tmp_path: Path, processes: ForkServerContext) -> None:
    barrier = processes.Barrier(3)
    writers = [processes.Process(target=put_together, args=(tmp_path, barrier, 0, 15)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    store = VersionStore(tmp_path, base_key=KEY)
    assert set(store.versions()) == set(map(version_of, range(15)))
    for number in range(15):
        assert_same(store.read(version_of(number)), model_of(number))


def test_what_a_living_writer_writes_is_left_alone(tmp_path: Path) -> None:
    VersionStore(tmp_path, base_key=KEY)
    aside = tmp_path / KEY / ASIDE
    aside.write_bytes(b"half of an adapter")
    with writing_in(tmp_path / KEY):
        VersionStore(tmp_path, base_key=KEY)
        assert aside.read_bytes() == b"half of an adapter"
    VersionStore(tmp_path, base_key=KEY)
    assert not aside.exists()
