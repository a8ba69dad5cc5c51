"""`--adapters-file`: the adapters and aliases that a YAML file asks for, at the start and whenever it changes.

A file with a mistake changes nothing at all and says line and why; so does one that is gone. One adapter that fails
stops no other and is tried again, each time later. Aliases wait for the adapters they lead to, and adapters that are to
go wait for the aliases that led to them. Knows nothing of YAML.
"""

import asyncio
import logging
import math
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from server.lifecycle.adapters_yaml import MAX_FILE_BYTES, AdaptersFileInvalid, WantedFile, parse_adapters_file
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.control import FILE_OWNER, AdapterControl, WantedAdapter
from server.lifecycle.path_watch import PathWatch, WatchPace
from server.lifecycle.reconciler import Deeds, Reconciler

logger = logging.getLogger(__name__)

Targets = tuple[AliasTarget, ...]


@dataclass(frozen=True, slots=True)
class _FileState:
    """Enough to see that the file is another one now."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int


class AdaptersFile:
    """Run as a task."""

    def __init__(self, path: Path, control: AdapterControl, *, pace: WatchPace | None = None) -> None:
        self._path = path.absolute()
        self._control = control
        self._pace = pace or WatchPace()
        self._read: _FileState | None = None  # what was last read, well or badly
        self._seen: tuple[_FileState, float] | None = None  # what is there now, and since when
        self._trouble = ""
        self._wanted: WantedFile | None = None
        self._adapters: Reconciler[WantedAdapter] = Reconciler(self._adapter_deeds(), {})
        self._aliases: Reconciler[Targets] = Reconciler(self._alias_deeds(), {})

    @property
    def failures(self) -> Mapping[str, str]:
        """Adapter or alias → why it is not as the file has it; the file itself under its path."""
        trouble = {str(self._path): self._trouble} if self._trouble else {}
        return {**trouble, **self._adapters.failures, **self._aliases.failures}

    async def run(self) -> None:
        """Until cancelled. The folder is watched, since editors and config maps put another file in place."""
        try:
            async with PathWatch(self._path.parent, recursive=False) as watch:
                while True:
                    await self._look()
                    await watch.changed(self._next_look() - time.monotonic())
        finally:
            await self._aliases.close()
            await self._adapters.close()

    def _next_look(self) -> float:
        is_at_rest = self._seen is None or self._seen[0] == self._read
        rest_at = math.inf if is_at_rest or self._seen is None else self._seen[1] + self._pace.quiet
        retry = min(self._adapters.next_retry, self._aliases.next_retry)
        return min(time.monotonic() + self._pace.rescan, rest_at, retry)

    async def _look(self) -> None:
        """Read the file when it is another one and at rest; then aim, which also starts the retries that are due."""
        try:
            state = await asyncio.to_thread(_state, self._path)
            if self._is_new_and_at_rest(state):
                self._read = state
                wanted = await asyncio.to_thread(_load, self._path)
                self._tell("")
                self._take_in(wanted)
        except AdaptersFileInvalid as error:
            self._tell(f"{error}; nothing is changed")
        except OSError as error:
            self._read = self._seen = None  # what keeps it from being read may go without changing the file
            self._tell(f"{error.strerror or error}; nothing is changed")
        if self._wanted is not None:
            self._adapters.aim(self._wanted.adapters)
            self._aliases.aim(self._wanted.aliases)

    def _is_new_and_at_rest(self, state: _FileState) -> bool:
        now = time.monotonic()
        if self._seen is None or self._seen[0] != state:
            self._seen = (state, now)
        is_old = state.modified_ns / 1e9 <= time.time() - self._pace.quiet
        return state != self._read and (is_old or now >= self._seen[1] + self._pace.quiet)

    def _take_in(self, wanted: WantedFile) -> None:
        if self._wanted is None:
            self._stand(wanted)
        self._wanted = wanted
        logger.info("%s asks for %d adapters, %d aliases", self._path, len(wanted.adapters), len(wanted.aliases))

    def _stand(self, wanted: WantedFile) -> None:
        """Where the first reading begins: what the records say this file asked for before the restart."""
        for name, known in self._control.managed(FILE_OWNER).items():
            self._adapters.standing[name] = replace(known, load_inplace=True, managed_by=FILE_OWNER)
        for name, targets in self._control.aliases_managed(FILE_OWNER).items():
            goal = wanted.aliases.get(name)
            self._aliases.standing[name] = goal if goal is not None and _is_same(goal, targets) else tuple(targets)

    def _tell(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            logger.error("%s: %s", self._path, trouble) if trouble else logger.info("%s is well again", self._path)

    # What is done for a name.

    def _adapter_deeds(self) -> Deeds[WantedAdapter]:
        return Deeds(
            owner=FILE_OWNER,
            kind="adapter",
            apply=lambda _, wanted: self._control.apply(wanted),
            remove=self._remove_adapter,
            owner_of=self._control.owner_of,
        )

    def _alias_deeds(self) -> Deeds[Targets]:
        return Deeds(
            owner=FILE_OWNER,
            kind="alias",
            apply=self._put_alias,
            remove=self._control.remove_alias,
            owner_of=self._control.owner_of,
        )

    async def _remove_adapter(self, name: str) -> None:
        await self._aliases.idle()  # so that no alias leads nowhere in between
        await self._control.remove(name)

    async def _put_alias(self, name: str, targets: Targets) -> None:
        await self._adapters.applied([target.adapter for target in targets])
        await self._control.put_alias(name, targets, managed_by=FILE_OWNER)


def _is_same(goal: Targets, known: Sequence[AliasTarget]) -> bool:
    """A goal may name a version by its first digits, a record has all of them."""
    return len(goal) == len(known) and all(
        (a.adapter, a.weight) == (b.adapter, b.weight)
        and (a.version == b.version or (a.version is not None and (b.version or "").startswith(a.version)))
        for a, b in zip(goal, known, strict=True)
    )


def _state(path: Path) -> _FileState:
    status = path.stat()
    return _FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _load(path: Path) -> WantedFile:
    """Raises AdaptersFileInvalid, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not wait for its writer
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AdaptersFileInvalid("it is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    return parse_adapters_file(data, path.parent)
