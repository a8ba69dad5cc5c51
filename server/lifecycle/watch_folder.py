"""`--adapter-dir`: the folders in one folder are adapters; appearing, changing and going load, replace and unload them.

A folder counts once it has come to rest. One that fails is tried again when it changes (a full memory, or a name that
is taken, also after a while), and meanwhile what was served under its name stays. Notifications make it fast, a rescan
makes it certain. A folder that cannot be looked at changes nothing: an unmounted disk is not an order to unload.

What was applied is remembered by fingerprint across restarts, so that thousands of folders are not read anew; losing
that memory costs only the reading. Knows nothing of what is in a folder's files.
"""

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.errors import AdapterNameInvalid, AdapterNotFound, AdapterRefused
from adapters.registry import check_adapter_name
from adapters.untrusted_json import shown
from server.lifecycle.control import FOLDER_OWNER, AdapterControl, WantedAdapter
from server.lifecycle.folder_scan import FolderScan, FoundAdapter, scan_folder
from server.lifecycle.path_watch import PathWatch, WatchPace
from server.lifecycle.reconciler import Deeds, Reconciler
from server.lifecycle.settling import Settling

logger = logging.getLogger(__name__)

_UNKNOWN = ""  # a fingerprint that no folder has: it is applied when its folder is seen, removed when it is not
_SCAN_SHARE = 50  # a rescan takes at most 1/50 of one core's time


class WatchedFolder:
    """Run as a task. `memory` is a file of the state directory for the fingerprints of what was applied, if any."""

    def __init__(
        self, root: Path, control: AdapterControl, *, memory: Path | None = None, pace: WatchPace | None = None
    ) -> None:
        self._root = root.absolute()
        self._control = control
        self._memory = memory
        self._pace = pace or WatchPace()
        known = _recall(memory, self._root)
        self._device = known.device
        standing = {
            name: known.fingerprints.get(name, _UNKNOWN) if wanted.source == self._source(name) else _UNKNOWN
            for name, wanted in control.managed(FOLDER_OWNER).items()
        }
        self._settling = Settling(standing, quiet=self._pace.quiet)
        self._reconciler = Reconciler(self._deeds(), standing)
        self._found: dict[str, Mapping[str, FoundAdapter]] = {}  # subfolder → the adapters in it by name
        self._unknown: dict[str, str] = {}
        self._trouble = ""
        self._rescan_at = -math.inf
        self._num_remembered = 0

    @property
    def failures(self) -> Mapping[str, str]:
        """Name → why its folder is not served as it is."""
        return self._reconciler.failures

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with PathWatch(self._root, recursive=True) as watch:
                changed: set[Path] = set()
                while True:
                    await self._look(changed)
                    await self._remember()
                    changed = await watch.changed(self._next_look() - time.monotonic())
        finally:
            await self._reconciler.close()

    def _deeds(self) -> Deeds[str]:
        return Deeds(
            owner=FOLDER_OWNER,
            kind="adapter",
            apply=self._apply,
            remove=self._control.remove,
            owner_of=self._control.owner_of,
            is_final=lambda error: isinstance(error, AdapterRefused | AdapterNameInvalid | AdapterNotFound),
        )

    async def _apply(self, name: str, fingerprint: str) -> None:
        """Settings that an operator gave the name meanwhile (pin, ttl, priority) stay."""
        check_adapter_name(name)
        wanted = WantedAdapter(name=name, source=self._source(name), managed_by=FOLDER_OWNER)
        known = self._control.wanted(name)
        if known is not None and known.managed_by == FOLDER_OWNER:
            wanted = replace(known, source=wanted.source, load_inplace=True, managed_by=FOLDER_OWNER)
        await self._control.apply(wanted)

    def _source(self, name: str) -> str:
        return str(self._root / name)

    def _next_look(self) -> float:
        if self._trouble:
            return self._rescan_at
        return min(self._rescan_at, self._settling.next_look, self._reconciler.next_retry)

    async def _look(self, changed: set[Path]) -> None:
        """Look at what changed and what is not at rest, or at everything when that is due; then aim at it."""
        began = time.monotonic()
        only = self._affected(changed)
        try:
            scan = await asyncio.to_thread(scan_folder, self._root, only)
            if only is not None and scan.device != self._device:
                only = None  # another file system: what is missing in a part may be missing altogether
                scan = await asyncio.to_thread(scan_folder, self._root)
            self._take_in(scan, only)
        except OSError as error:
            self._tell(f"{self._root} cannot be looked at ({error.strerror or error}); what is served stays")
            self._rescan_at = time.monotonic() + self._pace.rescan
            return
        now = time.monotonic()
        if only is None:
            self._rescan_at = now + max(self._pace.rescan, _SCAN_SHARE * (now - began))
        found = {name: each for inside in self._found.values() for name, each in inside.items()}
        hidden = {name for name in self._settling.settled if _top(name) in self._unknown}
        self._settling.update(found, now, time.time(), hidden=hidden)
        self._reconciler.aim(self._settling.settled)

    def _affected(self, changed: Iterable[Path]) -> frozenset[str] | None:
        """Subfolders to look at; None = all."""
        if time.monotonic() >= self._rescan_at or self._root in changed:
            return None
        relative = [path.relative_to(self._root) for path in changed if path.is_relative_to(self._root)]
        return frozenset([path.parts[0] for path in relative] + [_top(name) for name in self._settling.unsettled])

    def _take_in(self, scan: FolderScan, only: frozenset[str] | None) -> None:
        looked_at = {*self._found, *self._unknown, *scan.adapters, *scan.unknown} if only is None else only
        if self._is_unmounted(scan, only):
            raise OSError(0, "it is empty, and on another file system than before")
        self._device = scan.device
        for name in looked_at:
            if name in scan.unknown:
                self._tell_unknown(name, scan.unknown[name])
                continue  # as it was
            self._unknown.pop(name, None)
            if name in scan.adapters:
                self._found[name] = scan.adapters[name]
            else:
                self._found.pop(name, None)
        if only is None:
            self._tell("")

    def _is_unmounted(self, scan: FolderScan, only: frozenset[str] | None) -> bool:
        is_empty = only is None and not scan.adapters and not scan.unknown
        return is_empty and self._device not in (None, scan.device) and bool(self._settling.settled)

    def _tell(self, trouble: str) -> None:
        """Once, when it begins and when it is over."""
        if trouble != self._trouble:
            logger.warning("%s", trouble) if trouble else logger.info("%s is looked at again", self._root)
            self._trouble = trouble

    def _tell_unknown(self, name: str, why: str) -> None:
        if self._unknown.get(name) != why:
            logger.warning("%s cannot be looked at: %s", shown(self._source(name)), why)
        self._unknown[name] = why

    async def _remember(self) -> None:
        """Keep what was applied: a restart then reads only what changed."""
        if self._memory is None or self._device is None:
            return
        if self._num_remembered != self._reconciler.num_changes:
            self._num_remembered = self._reconciler.num_changes
            marks = {name: mark for name, mark in self._reconciler.standing.items() if mark}
            await asyncio.to_thread(_keep, self._memory, self._root, _Known(self._device, marks))


@dataclass(frozen=True, slots=True)
class _Known:
    device: int | None
    fingerprints: Mapping[str, str]


def _recall(memory: Path | None, root: Path) -> _Known:
    """What `_keep` wrote about `root`; nothing when it is not there, damaged, or about another folder."""
    try:
        data = json.loads(memory.read_text()) if memory is not None else {}
        if data.get("root") == str(root):
            return _Known(int(data["device"]), {str(name): str(mark) for name, mark in data["adapters"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("%s cannot be used (%s): every folder of %s is read again", memory, error, root)
    return _Known(None, {})


def _keep(memory: Path, root: Path, known: _Known) -> None:
    """Written aside and renamed. Not flushed: what is lost is only read again."""
    aside = memory.with_name(f".{memory.name}.{os.getpid()}")
    data = {"root": str(root), "device": known.device, "adapters": dict(known.fingerprints)}
    try:
        aside.write_text(json.dumps(data))
        aside.replace(memory)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the next start reads every folder again", memory, error)


def _top(name: str) -> str:
    return name.partition("/")[0]
