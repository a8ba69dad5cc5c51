"""What a name is set to: its settings, and back to the version before; loads nothing. On the event loop, no HTTP."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from adapters.adapter_ref import AdapterRef, AdapterVersion
from adapters.errors import AdapterCapacity, AdapterNotFound
from adapters.read_options import NO_OPTIONS, ReadOptions
from adapters.registry import AdapterRegistry
from adapters.untrusted_json import shown
from server.lifecycle.adapter_loader import AdapterLoader
from server.lifecycle.catalogue_records import AdapterRecord
from server.lifecycle.control import WantedAdapter
from server.lifecycle.directory import AdapterDirectory
from server.lifecycle.errors import NoPreviousVersion
from server.lifecycle.host_tier import HostTier
from server.lifecycle.sources.source_options import with_options

logger = logging.getLogger(__name__)


class NameChanges:
    def __init__(
        self, directory: AdapterDirectory, registry: AdapterRegistry, loader: AdapterLoader, host: HostTier
    ) -> None:
        self._directory = directory
        self._registry = registry
        self._loader = loader
        self._host = host

    def asked(
        self,
        name: str,
        source: str,
        *,
        load_inplace: bool = False,
        pin: bool | None = None,
        ttl: float | None = None,
        priority: int | None = None,
        options: ReadOptions = NO_OPTIONS,
    ) -> WantedAdapter:
        """What a caller of an API wants: a setting that is None stays as the name has it, and load options are the
        source's. Raises AdapterOptionInvalid.
        """
        known = self._directory.records.get(name) or AdapterRecord(name=name)
        return WantedAdapter(
            name=name,
            source=with_options(source, options),
            load_inplace=load_inplace,
            pin=known.pin if pin is None else pin,
            ttl=known.ttl if ttl is None else ttl,
            priority=known.priority if priority is None else priority,
        )

    async def change(
        self, name: str, *, pin: bool | None = None, ttl: float | None = None, priority: int | None = None
    ) -> None:
        """Change settings; None leaves one as it is, a `ttl` of 0 means for ever. Raises AdapterNotFound and
        AdapterCapacity, when what is pinned would leave too little to the others.
        """
        async with self._loader.name_lock(name):
            await self._directory.retried(lambda: self._change(name, pin, ttl, priority))

    async def _change(self, name: str, pin: bool | None, ttl: float | None, priority: int | None) -> None:
        record = self._record(name)
        new = replace(
            record,
            pin=record.pin if pin is None else pin,
            ttl=record.ttl if ttl is None else (ttl or None),
            priority=record.priority if priority is None else priority,
        )
        if record.version is not None:
            self._apply_policy(record.version, [new, *self._standing(record.version, unless=name)])
        try:
            await self._directory.put(new)
        except BaseException:
            if record.version is not None:
                self.follow_policy(record.version)
            raise

    async def rollback(self, name: str) -> AdapterRef:
        """Give the name back to the version before. Raises AdapterNotFound, NoPreviousVersion."""
        async with self._loader.name_lock(name):
            await self._directory.retried(lambda: self._rollback(name))
        return self._registry.describe(name).ref

    async def _rollback(self, name: str) -> None:
        record = self._record(name)
        if record.version is None or not record.previous:
            raise NoPreviousVersion(f"{shown(name)!r} has no version before the one it stands for")
        version, *older = record.previous
        source = self._directory.version(version).source
        await self._directory.put(
            replace(record, version=version, source=source, previous=(record.version, *older), failure=None)
        )

    def _record(self, name: str) -> AdapterRecord:
        record = self._directory.records.get(name)
        if record is None:
            raise AdapterNotFound(f"no adapter is registered as {shown(name)!r}")
        return record

    def follow_policies(self) -> None:
        """`follow_policy` of every version that is asked for something: thousands of names may stand for one."""
        records = self._directory.records.values()
        for version in {r.version for r in records if r.version is not None and (r.pin or r.priority)}:
            self.follow_policy(version)

    def follow_policy(self, version: AdapterVersion) -> None:
        """Let the host tier know what the names that stand for a version ask for: nothing when there are none."""
        try:
            self._apply_policy(version, self._standing(version))
        except AdapterCapacity as error:  # of another server, or of a start with less memory
            logger.warning("version %s is not pinned: %s", version[:12], error)

    def _standing(self, version: AdapterVersion, *, unless: str | None = None) -> list[AdapterRecord]:
        """The records that stand for the version now."""
        records = (self._directory.records[name] for name in self._registry.names_of(version) if name != unless)
        return [record for record in records if record.version == version]

    def _apply_policy(self, version: AdapterVersion, records: Sequence[AdapterRecord]) -> None:
        """Pin and priority are of names; a version has the highest of those that stand for it."""
        if not records:
            self._host.set_policy(version, 0, pin=False, priority=0)
            return
        self._host.set_policy(
            version,
            self._directory.version(version).num_bytes,
            pin=any(each.pin for each in records),
            priority=max(each.priority for each in records),
        )


def wanted_of(record: AdapterRecord) -> WantedAdapter:
    """What a record asks for, as a reconciler would."""
    return WantedAdapter(
        name=record.name,
        source=record.source or "",
        pin=record.pin,
        ttl=record.ttl,
        priority=record.priority,
        managed_by=record.managed_by,
    )
