"""Takes a name away: its load ends, the record goes, requests end in their time, and what was held is freed."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from adapters.adapter_ref import AdapterRef, Lease
from adapters.errors import AdapterNotFound
from adapters.registry import AdapterRegistry
from adapters.untrusted_json import shown
from server.lifecycle.adapter_loader import AdapterLoader
from server.lifecycle.catalogue_records import AdapterRecord
from server.lifecycle.directory import AdapterDirectory
from server.lifecycle.errors import NameConflict
from server.lifecycle.version_keeper import Freed, VersionKeeper

_REVOKED_SECONDS = 10.0  # for requests that were told to end to do so
_LOOK_SECONDS = 0.02


OnlyIf = Callable[[AdapterRecord], bool]


class StillWanted(Exception):
    """The name is not to be taken away after all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """What taking a name away did. Bytes are 0 while the version drains, or stays under another name."""

    name: str
    ref: AdapterRef | None  # None: it never stood for anything
    is_draining: bool
    freed: Freed

    def to_dict(self) -> dict[str, Any]:
        return {
            "object": "adapter",
            "name": self.name,
            "version": None if self.ref is None else self.ref.version,
            "state": "draining" if self.is_draining else "unloaded",
            "deleted": True,
            "freed": {"host_bytes": self.freed.host_bytes, "device_bytes": self.freed.device_bytes},
        }


class Unloading:
    def __init__(
        self, directory: AdapterDirectory, registry: AdapterRegistry, loader: AdapterLoader, keeper: VersionKeeper
    ) -> None:
        self._directory = directory
        self._registry = registry
        self._loader = loader
        self._keeper = keeper

    async def unload(
        self, name: str, *, abort: bool, deadline: float | None, only_if: OnlyIf = lambda record: True
    ) -> Unloaded:
        """See AdapterService.unload. Raises StillWanted when the record is not, or is no longer, one that `only_if`
        means.
        """
        if not only_if(self._record(name)):
            raise StillWanted(name)
        self._refuse_aliased(name)  # before its load is ended, which would be a change
        await self._loader.cancel(name)
        with ExitStack() as notes:
            try:
                ref, leases, noted = await self._take_away(name, notes, only_if)
            except BaseException:
                self._resume(name)
                raise
            await self._end(leases, abort=abort, deadline=deadline)
            if ref is not None:
                await self._keeper.until_freed(ref.version)
        is_draining = any(lease.is_open for lease in leases)
        return Unloaded(name=name, ref=ref, is_draining=is_draining, freed=max(noted, default=Freed()))

    async def _take_away(
        self, name: str, notes: ExitStack, only_if: OnlyIf
    ) -> tuple[AdapterRef | None, list[Lease], list[Freed]]:
        """What the name stood for, who came by it and is not done, and where it is noted what is freed."""
        async with self._loader.name_lock(name), self._directory.linking:
            return await self._directory.retried(lambda: self._delete(name, notes, only_if))

    async def _delete(
        self, name: str, notes: ExitStack, only_if: OnlyIf
    ) -> tuple[AdapterRef | None, list[Lease], list[Freed]]:
        record = self._record(name)
        if not only_if(record):
            raise StillWanted(name)
        self._refuse_aliased(name)
        ref = self._directory.current(name)
        noted = notes.enter_context(self._keeper.noting(record.version))
        await self._directory.delete(record)
        held = (lease for version in record.named_versions for lease in self._registry.leases(version))
        leases = [lease for lease in held if lease.ref.name == name]  # all there are: the name is gone
        return ref, leases, noted

    def _resume(self, name: str) -> None:
        """The name stays after all, so its load goes on."""
        record = self._directory.records.get(name)
        if record is not None and name not in self._loader.jobs:
            self._loader.resume(record)

    def _record(self, name: str) -> AdapterRecord:
        record = self._directory.records.get(name)
        if record is None:
            raise AdapterNotFound(f"no adapter is registered as {shown(name)!r}")
        return record

    def _refuse_aliased(self, name: str) -> None:
        leading = [a.name for a in self._directory.aliases.values() if any(t.adapter == name for t in a.targets)]
        if leading:
            raise NameConflict(f"the alias {leading[0]!r} leads to {name!r}; move or delete the alias first")

    async def _end(self, leases: Sequence[Lease], *, abort: bool, deadline: float | None) -> None:
        if not abort and deadline is None:
            return
        if not abort:
            await _until_released(leases, deadline or 0.0)
        for lease in leases:
            if lease.is_open:
                lease.revoke()
        await _until_released(leases, _REVOKED_SECONDS)


async def _until_released(leases: Sequence[Lease], seconds: float) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while any(lease.is_open for lease in leases) and loop.time() < end:
        await asyncio.sleep(_LOOK_SECONDS)
