"""A file that says what is to be served, real files: followed, and never half or wrongly."""

import asyncio
import logging
import os
from pathlib import Path

import pytest

from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterCapacity
from server.lifecycle import adapters_file, path_watch
from server.lifecycle.adapters_file import AdaptersFile
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.path_watch import WatchPace
from tests.server.lifecycle.fake_control import FakeControl, running, until

pytestmark = pytest.mark.asyncio

_FAST = WatchPace(rescan=0.2, quiet=0.1)
_EMPTY = "adapters: []\n"


def _text(*names: str, **aliases: str) -> str:
    adapters = "".join(f"\n  - {{name: {name}, source: /m/{name}}}" for name in names) or " []"
    moved = "".join(f"\n  {alias}: [{{adapter: '{target}'}}]" for alias, target in aliases.items()) or " {}"
    return f"adapters:{adapters}\naliases:{moved}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapters.yaml"


def _file(path: Path, control: FakeControl) -> AdaptersFile:
    return AdaptersFile(path, control, pace=_FAST)


def _replace(path: Path, text: str) -> None:
    """As editors do: another file in its place."""
    aside = path.with_name("aside")
    aside.write_text(text)
    aside.replace(path)


@pytest.mark.parametrize("notified", [True, False])
async def test_the_file_is_followed(path: Path, monkeypatch: pytest.MonkeyPatch, notified: bool) -> None:
    if not notified:
        monkeypatch.setattr(path_watch, "watch", lambda *_, **__: (_ for _ in ()).throw(OSError("none left")))
    control = FakeControl()
    path.write_text(_text("a", "b", default="a"))
    async with running(_file(path, control)):
        await until(lambda: set(control.records) == {"a", "b"} and "default" in control.aliases)
        assert control.records["a"].managed_by == "file"
        assert control.records["a"].source == "/m/a"
        _replace(path, _text("b", "c", default="c"))
        await until(lambda: set(control.records) == {"b", "c"})
        await until(lambda: control.aliases["default"] == ("file", (AliasTarget(adapter="c"),)))
        path.write_text(_EMPTY)
        await until(lambda: not control.records and not control.aliases)
    assert control.times("apply", "b") == 1


async def test_a_changed_setting_is_applied_to_its_adapter_alone(path: Path) -> None:
    control = FakeControl()
    path.write_text(_text("a", "b"))
    async with running(_file(path, control)):
        await until(lambda: len(control.records) == 2)
        path.write_text(_text("a", "b").replace("/m/a", "/m/a, pin: true, ttl: 9, priority: 3"))
        await until(lambda: control.records["a"].pin)
    assert (control.records["a"].ttl, control.records["a"].priority) == (9.0, 3)
    assert control.times("apply", "b") == 1


@pytest.mark.parametrize(
    "bad",
    ["", "adapters: [", "adapters: [{name: a}]", "adapters: [{name: z, source: /z}, 7]", "x: 1", "a: &a [*a]"],
)
async def test_a_bad_file_changes_nothing_and_is_told_once(
    path: Path, bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    control = FakeControl()
    path.write_text(_text("a", default="a"))
    file = _file(path, control)
    async with running(file):
        await until(lambda: "default" in control.aliases)
        before = list(control.calls)
        _replace(path, bad)
        await until(lambda: str(path) in file.failures)
        await asyncio.sleep(0.8)
        assert control.calls == before
        told = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(told) == 1
        assert str(path) in told[0] and ("line " in told[0] or "empty" in told[0])
        _replace(path, _text("b"))
        await until(lambda: set(control.records) == {"b"} and not control.aliases)
        assert file.failures == {}


async def test_a_bad_file_at_the_start_unloads_nothing(path: Path) -> None:
    control = FakeControl()
    control.own("a", "file", "/m/a")
    path.write_text("adapters: [")
    file = _file(path, control)
    async with running(file):
        await until(lambda: file.failures != {})
        await asyncio.sleep(0.5)
        assert control.calls == []
        path.write_text(_text("b"))
        await until(lambda: set(control.records) == {"b"})


async def test_a_missing_file_unloads_nothing_and_counts_when_it_is_back(path: Path) -> None:
    control = FakeControl()
    path.write_text(_text("a"))
    file = _file(path, control)
    async with running(file):
        await until(lambda: "a" in control.records)
        path.unlink()
        await until(lambda: "No such file" in file.failures.get(str(path), ""))
        await asyncio.sleep(0.5)
        assert control.calls == [("apply", "a")]
        path.write_text(_text("b"))
        await until(lambda: set(control.records) == {"b"})


async def test_a_file_that_could_not_be_read_is_read_when_it_can_be(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the file changes when its volume comes back or its permissions do."""
    control, real = FakeControl(), adapters_file._load
    path.write_text(_text("a"))

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(adapters_file, "_load", refuse)
    file = _file(path, control)
    async with running(file):
        await until(lambda: file.failures == {str(path): "Permission denied; nothing is changed"})
        monkeypatch.setattr(adapters_file, "_load", real)
        await until(lambda: "a" in control.records and file.failures == {})


async def test_what_is_no_regular_file_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    file = _file(path, FakeControl())
    async with running(file):
        await until(lambda: "not a regular file" in file.failures.get(str(path), ""))


async def test_a_folder_in_place_of_the_file_costs_no_descriptors(path: Path) -> None:
    """Docker makes one where a bind mount's file is missing; it is looked at again at every rescan."""
    path.mkdir()
    os.utime(path, (1, 1))
    file = _file(path, FakeControl())
    await file._look()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        file._read = None  # as after any failure of the system
        await file._look()
    assert len(os.listdir("/proc/self/fd")) < before + 10
    assert "not a regular file" in file.failures[str(path)]


async def test_a_linked_file_is_followed_when_the_link_moves(path: Path) -> None:
    """As Kubernetes mounts a config map."""
    control = FakeControl()
    for turn, name in enumerate("ab"):
        (path.parent / f"..{turn}").mkdir()
        (path.parent / f"..{turn}" / path.name).write_text(_text(name))
    data = path.parent / "..data"
    data.symlink_to("..0")
    path.symlink_to(Path("..data", path.name))
    async with running(_file(path, control)):
        await until(lambda: set(control.records) == {"a"})
        (path.parent / "..tmp").symlink_to("..1")
        (path.parent / "..tmp").replace(data)
        await until(lambda: set(control.records) == {"b"})


async def test_one_failure_stops_no_other_and_is_tried_again(path: Path) -> None:
    control = FakeControl()
    control.faults["a"] = AdapterCapacity("full")
    path.write_text(_text("a", "b", of_a="a", of_b="b"))
    file = _file(path, control)
    async with running(file):
        await until(lambda: "of_b" in control.aliases and set(file.failures) == {"a", "of_a"})
        assert file.failures["a"] == "full"
        control.faults.clear()
        await until(lambda: "a" in control.records and "of_a" in control.aliases)
        assert file.failures == {}


async def test_an_alias_waits_for_its_adapter(path: Path) -> None:
    control = FakeControl()
    control.gates["slow"] = gate = asyncio.Event()
    path.write_text(_text("slow", "a", of_slow="slow", of_a="a"))
    async with running(_file(path, control)):
        await until(lambda: "of_a" in control.aliases)
        assert control.times("put_alias", "of_slow") == 0
        gate.set()
        await until(lambda: "of_slow" in control.aliases)
    assert control.times("put_alias", "of_slow") == 1


async def test_an_adapter_goes_after_the_aliases_that_led_to_it(path: Path) -> None:
    control = FakeControl()
    path.write_text(_text("old", default="old", other="old"))
    async with running(_file(path, control)):
        await until(lambda: len(control.aliases) == 2)
        control.calls.clear()
        control.gates["new"] = gate = asyncio.Event()
        path.write_text(_text("new", default="new"))
        await until(lambda: "other" not in control.aliases)
        await asyncio.sleep(0.5)
        assert "old" in control.records  # the alias still leads there while the new one loads
        gate.set()
        await until(lambda: "old" not in control.records)
    assert control.calls.index(("put_alias", "default")) < control.calls.index(("remove", "old"))


async def test_many_adapters_and_aliases_that_change_places_do_not_block_each_other(path: Path) -> None:
    """More removals than slots wait for aliases, which wait for applies, which wait for slots."""
    control = FakeControl()
    first, second = [f"a{n}" for n in range(40)], [f"b{n}" for n in range(40)]
    path.write_text(_text(*first, **{f"of{n}": f"a{n}" for n in range(40)}))
    async with running(_file(path, control)):
        await until(lambda: len(control.aliases) == 40)
        path.write_text(_text(*second, **{f"of{n}": f"b{n}" for n in range(40)}))
        await until(lambda: set(control.records) == set(second))
        assert {targets[0].adapter for _, targets in control.aliases.values()} == set(second)
        path.write_text(_text(*(f"of{n}" for n in range(40)), **dict.fromkeys(second, "of0")))  # names swap kinds
        await until(lambda: len(control.records) == 40 and set(control.aliases) == set(second))


async def test_names_of_others_are_left_alone(path: Path) -> None:
    control = FakeControl()
    control.own("mine", "api", "/api")
    control.own("folder", "folder", "/folder")
    control.aliases["canary"] = ("api", ())
    path.write_text(_text("mine", "a", canary="a"))
    file = _file(path, control)
    async with running(file):
        await until(lambda: set(file.failures) == {"mine", "canary"} and "a" in control.records)
        path.write_text(_EMPTY)
        await until(lambda: "a" not in control.records)
        await asyncio.sleep(0.3)
    assert {name: record.source for name, record in control.records.items()} == {"mine": "/api", "folder": "/folder"}
    assert control.aliases == {"canary": ("api", ())}


async def test_a_restart_applies_only_what_differs_from_the_records(path: Path) -> None:
    control = FakeControl()
    path.write_text(_text("same", "changed", "gone", to_same="same", to_gone="gone"))
    async with running(_file(path, control)):
        await until(lambda: len(control.records) == 3 and len(control.aliases) == 2)
    control.calls.clear()
    path.write_text(_text("same", "changed", "new", to_same="same").replace("/m/changed", "/m/other"))
    async with running(_file(path, control)):
        await until(lambda: set(control.records) == {"same", "changed", "new"} and set(control.aliases) == {"to_same"})
        await asyncio.sleep(0.3)
    expected = [("apply", "changed"), ("apply", "new"), ("remove", "gone"), ("remove_alias", "to_gone")]
    assert sorted(control.calls) == expected


async def test_a_version_by_its_first_digits_is_the_records_whole_one(path: Path) -> None:
    control = FakeControl()
    control.own("a", "file", "/m/a")
    whole = AdapterVersion("1234abcd" + "0" * 56)
    control.aliases["canary"] = ("file", (AliasTarget(adapter="a", version=whole),))
    path.write_text(_text("a", canary="a@1234abcd"))
    async with running(_file(path, control)):
        await asyncio.sleep(0.6)
        assert control.calls == []
        path.write_text(_text("a", canary="a@9999abcd"))
        await until(lambda: control.times("put_alias", "canary") == 1)


async def test_an_adapter_taken_away_by_hand_stays_away_until_the_file_changes_it(path: Path) -> None:
    control = FakeControl()
    path.write_text(_text("a", "b"))
    async with running(_file(path, control)):
        await until(lambda: len(control.records) == 2)
        del control.records["a"]
        path.write_text(_text("a", "b", "c"))
        await until(lambda: "c" in control.records)
        assert "a" not in control.records
        path.write_text(_text("a", "b", "c").replace("/m/a", "/m/a2"))
        await until(lambda: "a" in control.records)
