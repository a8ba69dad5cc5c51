"""A folder of adapters, real files: appearing, half copied, changed, renamed, gone, unreadable, unmounted."""

import asyncio
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import AdapterCapacity, AdapterRefused, RefusalCode
from server.lifecycle import path_watch, watch_folder
from server.lifecycle.folder_scan import FolderScan, scan_folder
from server.lifecycle.path_watch import WatchPace
from server.lifecycle.watch_folder import WatchedFolder
from tests.server.lifecycle.fake_control import FakeControl, running, until

pytestmark = pytest.mark.asyncio

_FAST = WatchPace(rescan=0.2, quiet=0.1)


def _write(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def _watched(root: Path, control: FakeControl, memory: Path | None = None) -> WatchedFolder:
    return WatchedFolder(root, control, memory=memory, pace=_FAST)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder


@pytest.fixture
def no_notifications(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no watches are left")

    monkeypatch.setattr(path_watch, "watch", refuse)


async def _life(root: Path, control: FakeControl) -> None:
    """Appearing, changing, a second one, going."""
    _write(root / "a")
    async with running(_watched(root, control)):
        await until(lambda: set(control.records) == {"a"})
        assert control.records["a"].source == str(root / "a")
        assert control.records["a"].managed_by == "folder"
        assert control.records["a"].load_inplace
        _write(root / "org" / "b")
        await until(lambda: set(control.records) == {"a", "org/b"})
        (root / "a" / "adapter_model.safetensors").write_bytes(b"others")
        await until(lambda: control.times("apply", "a") == 2)
        shutil.rmtree(root / "org")
        await until(lambda: set(control.records) == {"a"})
        (root / "a").rename(root / "c")
        await until(lambda: set(control.records) == {"c"})
    assert control.calls.count(("apply", "org/b")) == 1


async def test_folders_are_followed(root: Path) -> None:
    await _life(root, FakeControl())


async def test_folders_are_followed_without_notifications(root: Path, no_notifications: None) -> None:
    await _life(root, FakeControl())


async def test_a_folder_renamed_into_place_is_there_within_a_second(root: Path, tmp_path: Path) -> None:
    """By notification: a rescan is an hour away. The best of a few, since the machine may be busy."""
    control = FakeControl()
    watched = WatchedFolder(root, control, pace=WatchPace(rescan=3600.0))
    took = []
    async with running(watched):
        await asyncio.sleep(1.0)  # the watch is set up in its thread
        for turn in range(5):
            aside = _write(tmp_path / f"aside{turn}")
            await asyncio.sleep(0.5)
            began = time.monotonic()
            aside.rename(root / f"new{turn}")
            await until(lambda turn=turn: f"new{turn}" in control.records)  # type: ignore[misc]
            took.append(time.monotonic() - began)
    assert min(took) < 1.0, took


async def test_a_folder_being_copied_is_not_read_before_it_is_at_rest(root: Path) -> None:
    control = FakeControl()
    watched = WatchedFolder(root, control, pace=WatchPace(rescan=0.1, quiet=1.0))
    async with running(watched):
        folder = _write(root / "a", b"")
        with (folder / "adapter_model.safetensors").open("wb", buffering=0) as file:
            for _ in range(20):
                file.write(b"x" * 100)
                await asyncio.sleep(0.05)
            ended = time.monotonic()
        await until(lambda: bool(control.calls))
        assert time.monotonic() - ended > 0.8
    assert control.calls == [("apply", "a")]


async def test_changed_while_it_was_read_is_read_again(root: Path) -> None:
    control = FakeControl()
    control.gates["a"] = gate = asyncio.Event()
    _write(root / "a")
    async with running(_watched(root, control)):
        await until(lambda: control.times("apply", "a") == 1)
        (root / "a" / "adapter_model.safetensors").write_bytes(b"others")
        await asyncio.sleep(0.5)
        gate.set()
        await until(lambda: control.times("apply", "a") == 2)


async def test_a_refused_folder_is_told_once_and_tried_when_it_changes(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control = FakeControl()
    control.faults["a"] = AdapterRefused(RefusalCode.CORRUPT, "it is cut short", "copy it again")
    _write(root / "a")
    _write(root / "b")
    watched = _watched(root, control)
    with caplog.at_level(logging.WARNING, "server.lifecycle"):
        async with running(watched):
            await until(lambda: "b" in control.records and "a" in watched.failures)
            await asyncio.sleep(1.0)  # several rescans
            assert control.times("apply", "a") == 1
            assert [r.getMessage().count("it is cut short") for r in caplog.records] == [1]
            del control.faults["a"]
            (root / "a" / "adapter_model.safetensors").write_bytes(b"whole now")
            await until(lambda: set(control.records) == {"a", "b"})
            assert watched.failures == {}


async def test_a_full_memory_is_tried_again(root: Path) -> None:
    control = FakeControl()
    control.faults["a"] = AdapterCapacity("full")
    _write(root / "a")
    async with running(_watched(root, control)):
        await until(lambda: control.times("apply", "a") == 2)
        control.faults.clear()
        await until(lambda: "a" in control.records)


@pytest.mark.parametrize("name", ["-a", "a b", "ä", "a..b", "a\nb"])
async def test_a_folder_with_a_name_no_adapter_may_have_is_told(
    root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    control = FakeControl()
    _write(root / name)
    _write(root / "good")
    watched = _watched(root, control)
    async with running(watched):
        await until(lambda: "good" in control.records and name in watched.failures)
    assert set(control.records) == {"good"}
    assert all("\n" not in record.getMessage() for record in caplog.records)


async def test_what_is_no_adapter_is_let_be(root: Path) -> None:
    control = FakeControl()
    _write(root / ".partial")
    _write(root / "org" / ".aside")
    _write(root / "a" / "b" / "deep")
    _write(root / "run")
    _write(root / "run" / "checkpoint-1")  # of the adapter above it
    (root / "empty").mkdir()
    (root / "file").write_text("")
    (root / "README.md").write_text("")
    async with running(_watched(root, control)):
        await until(lambda: "run" in control.records)
        await asyncio.sleep(0.5)
    assert control.calls == [("apply", "run")]


async def test_other_files_of_a_folder_are_no_change(root: Path) -> None:
    control = FakeControl()
    _write(root / "a")
    async with running(_watched(root, control)):
        await until(lambda: "a" in control.records)
        (root / "a" / "README.md").write_text("about")
        (root / "a" / "training.log").write_text("about")
        await asyncio.sleep(0.8)
    assert control.times("apply", "a") == 1


async def test_a_change_keeps_the_settings_an_operator_gave(root: Path) -> None:
    control = FakeControl()
    _write(root / "a")
    async with running(_watched(root, control)):
        await until(lambda: "a" in control.records)
        control.pin("a")
        (root / "a" / "adapter_model.safetensors").write_bytes(b"others")
        await until(lambda: control.times("apply", "a") == 2)
        await until(lambda: control.records["a"].pin)


async def test_names_of_others_outlive_the_folder(root: Path) -> None:
    control = FakeControl()
    control.own("mine", "api")
    control.own("theirs", "file")
    folder = _write(root / "mine")
    watched = _watched(root, control)
    async with running(watched):
        await until(lambda: "mine" in watched.failures)
        shutil.rmtree(folder)
        await until(lambda: watched.failures == {})
        await asyncio.sleep(0.5)
    assert set(control.records) == {"mine", "theirs"}
    assert control.calls == []


# Restarts.


async def test_restart_reads_only_what_changed_and_removes_what_is_gone(root: Path, tmp_path: Path) -> None:
    control, memory = FakeControl(), tmp_path / "memory.json"
    for name in ("same", "changed", "gone"):
        _write(root / name)
    async with running(_watched(root, control, memory)):
        await until(lambda: len(control.records) == 3)
        await until(lambda: memory.exists() and len(json.loads(memory.read_text())["adapters"]) == 3)
    control.calls.clear()
    (root / "changed" / "adapter_model.safetensors").write_bytes(b"others")
    shutil.rmtree(root / "gone")
    async with running(_watched(root, control, memory)):
        await until(lambda: set(control.records) == {"same", "changed"} and control.times("apply", "changed") == 1)
        await asyncio.sleep(0.5)
    assert sorted(control.calls) == [("apply", "changed"), ("remove", "gone")]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"root": 1}', '{"root": "ROOT", "adapters": []}', "\xff"])
async def test_a_damaged_memory_costs_only_the_reading(root: Path, tmp_path: Path, damage: str) -> None:
    control, memory = FakeControl(), tmp_path / "memory.json"
    memory.write_bytes(damage.replace("ROOT", str(root)).encode("latin-1"))
    control.own("a", "folder", str(_write(root / "a")))
    async with running(_watched(root, control, memory)):
        await until(lambda: control.times("apply", "a") == 1)
    assert set(control.records) == {"a"}


async def test_a_name_whose_record_has_another_source_is_applied(root: Path, tmp_path: Path) -> None:
    control, memory = FakeControl(), tmp_path / "memory.json"
    _write(root / "a")
    async with running(_watched(root, control, memory)):
        await until(lambda: memory.exists() and "a" in json.loads(memory.read_text())["adapters"])
    control.own("a", "folder", "/elsewhere")
    async with running(_watched(root, control, memory)):
        await until(lambda: control.records["a"].source == str(root / "a"))


# Folders that cannot be looked at.


async def test_a_folder_that_is_away_unloads_nothing_and_counts_again_when_it_is_back(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control = FakeControl()
    _write(root / "a")
    async with running(_watched(root, control)):
        await until(lambda: "a" in control.records)
        away = root.rename(root.with_name("away"))
        await until(lambda: "cannot be looked at" in caplog.text)
        await asyncio.sleep(0.6)
        assert control.times("remove", "a") == 0
        away.rename(root)
        _write(root / "b")
        await until(lambda: set(control.records) == {"a", "b"})
        assert control.times("apply", "a") == 1
    assert caplog.text.count("cannot be looked at") == 1


async def test_a_missing_folder_at_the_start_unloads_nothing(tmp_path: Path) -> None:
    control = FakeControl()
    control.own("a", "folder", str(tmp_path / "none" / "a"))
    async with running(_watched(tmp_path / "none", control)):
        await asyncio.sleep(0.5)
        assert control.calls == []
        _write(tmp_path / "none" / "a")
        await until(lambda: control.times("apply", "a") == 1)


def _scan_failing_for(name: str, broken: list[bool]) -> Callable[..., FolderScan]:
    """`scan_folder` as it is when one subfolder gives EIO while `broken`."""

    def scan(root: Path, only: frozenset[str] | None = None) -> FolderScan:
        found = scan_folder(root, only)
        if not broken or (only is not None and name not in only):
            return found
        return FolderScan({k: v for k, v in found.adapters.items() if k != name}, {name: "I/O error"}, found.device)

    return scan


@pytest.mark.parametrize("from_the_start", [True, False])
async def test_a_subfolder_that_cannot_be_looked_at_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch, from_the_start: bool
) -> None:
    control = FakeControl()
    broken = [True] if from_the_start else []
    monkeypatch.setattr(watch_folder, "scan_folder", _scan_failing_for("a", broken))
    control.own("a", "folder", str(_write(root / "a")))
    async with running(_watched(root, control)):
        if not from_the_start:
            await until(lambda: control.times("apply", "a") == 1)
        broken.append(True)
        _write(root / "b")
        await until(lambda: "b" in control.records)
        await asyncio.sleep(0.6)
        assert control.times("remove", "a") == 0
        broken.clear()
        shutil.rmtree(root / "a")
        await until(lambda: set(control.records) == {"b"})


async def test_an_empty_folder_on_another_file_system_is_an_unmounted_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    control = FakeControl()
    _write(root / "a")
    unmounted: list[bool] = []

    def scan(path: Path, only: frozenset[str] | None = None) -> FolderScan:
        return FolderScan({}, {}, -1) if unmounted else scan_folder(path, only)

    monkeypatch.setattr(watch_folder, "scan_folder", scan)
    async with running(_watched(root, control)):
        await until(lambda: "a" in control.records)
        unmounted.append(True)
        await until(lambda: "on another file system than before" in caplog.text)
        await asyncio.sleep(0.6)
        assert control.times("remove", "a") == 0


@pytest.mark.parametrize("changed", [False, True])
async def test_a_look_at_a_part_does_not_make_an_unmounted_folder_the_known_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """Such a look comes with a retry, or with a name that is not at rest, before the next look at everything."""
    control, device = FakeControl(), 1

    def scan(path: Path, only: frozenset[str] | None = None) -> FolderScan:
        return replace(scan_folder(path, only), device=device)

    monkeypatch.setattr(watch_folder, "scan_folder", scan)
    _write(root / "a")
    watched = _watched(root, control)
    while "a" not in control.records:
        await watched._look({root})
        await asyncio.sleep(0.05)
    away = root.rename(root.with_name("away"))
    root.mkdir()
    device = 2
    watched._rescan_at = math.inf
    await watched._look({root / "a"} if changed else set())
    for _ in range(3):
        await watched._look({root})
        await asyncio.sleep(0.15)
    assert control.times("remove", "a") == 0
    assert "on another file system" in watched._trouble
    root.rmdir()
    away.rename(root)
    shutil.rmtree(root / "a")
    device = 1
    while "a" in control.records:
        await watched._look({root})
        await asyncio.sleep(0.05)
    assert watched._trouble == ""
    await watched._reconciler.close()


# The scan by itself.


async def test_the_fingerprint_is_of_what_a_loader_reads(root: Path) -> None:
    def mark() -> str:
        return scan_folder(root).adapters["a"]["a"].fingerprint

    folder = _write(root / "a")
    weights = folder / "adapter_model.safetensors"
    marks = [mark()]
    (folder / "notes").write_text("x")
    assert mark() == marks[0]
    status = weights.stat()
    weights.write_bytes(b"WEIGHTS")  # as many bytes
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    marks.append(mark())
    other = folder / "other"
    other.write_bytes(b"WEIGHTS")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    other.replace(weights)  # size and time alike, another file
    marks.append(mark())
    (folder / "model.safetensors.index.json").write_text("{}")
    marks.append(mark())
    assert len(set(marks)) == len(marks)


async def test_links_are_followed_and_those_that_lead_nowhere_are_nothing(root: Path, tmp_path: Path) -> None:
    _write(tmp_path / "elsewhere")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "nowhere").symlink_to(tmp_path / "none")
    (root / "loop").symlink_to(root)
    _write(root / "a")
    (root / "a" / "extra.safetensors").symlink_to(tmp_path / "none")
    found = scan_folder(root).adapters
    assert set(found["linked"]) == {"linked"}
    assert "nowhere" not in found
    assert set(found["loop"]) == {"loop/a", "loop/linked"}
    assert set(found["a"]) == {"a"}


async def test_config_alone_has_no_weights(root: Path) -> None:
    (_write(root / "a") / "adapter_model.safetensors").unlink()
    assert not scan_folder(root).adapters["a"]["a"].has_weights
    with pytest.raises(OSError, match="No such file"):
        scan_folder(root / "none")


async def test_thousands_of_folders_are_scanned_fast(root: Path) -> None:
    for number in range(2000):
        _write(root / f"a{number}")
    took = []
    for _ in range(5):
        began = time.monotonic()
        assert len(scan_folder(root).adapters) == 2000
        took.append(time.monotonic() - began)
    print(f"{min(took) * 1e6 / 2000:.0f} us a folder")
    assert min(took) < 2.0


async def test_a_link_that_leads_in_a_circle_stops_nothing_else(root: Path) -> None:
    control = FakeControl()
    (root / "circle").symlink_to(root / "circle")
    _write(root / "a")
    async with running(_watched(root, control)):
        await until(lambda: set(control.records) == {"a"})
    assert "circle" in scan_folder(root).unknown
