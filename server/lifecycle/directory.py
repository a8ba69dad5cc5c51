"""What is wanted and known of every name, in memory as in the catalogue; the registry follows it. On the event loop.

A change is made durable first and then here, with nothing in between that could fail. Changes by other servers on the
same catalogue are taken over by `refresh`. Knows no weights, no sources, and not why a record changes.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import MappingProxyType
from typing import TypeVar

from adapters.adapter_ref import AdapterRef, AdapterVersion
from adapters.errors import AdapterNameInvalid
from adapters.registry import AdapterRegistry
from server.lifecycle.catalogue import Catalogue
from server.lifecycle.catalogue_errors import (
    CatalogueConflict,
    CatalogueError,
    CatalogueHistoryGone,
    CatalogueUnavailable,
)
from server.lifecycle.catalogue_records import AdapterRecord, AliasRecord, Changes, Snapshot, VersionRecord
from server.lifecycle.errors import ChangedElsewhere
from server.lifecycle.pending_load import parse_pending
from server.lifecycle.to_its_end import to_its_end

logger = logging.getLogger(__name__)

_ATTEMPTS = 5  # at a change that other servers get in the way of

_T = TypeVar("_T")


class AdapterDirectory:
    """`on_change` is told every name whose record or alias changed, after the change, and the versions that the name
    named before or names now.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        registry: AdapterRegistry,
        on_change: Callable[[str, frozenset[AdapterVersion]], None],
    ) -> None:
        self._catalogue = catalogue
        self._registry = registry
        self._on_change = on_change
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="catalogue")  # calls in order, one at a time
        self._sequence = 0
        self._records: dict[str, AdapterRecord] = {}
        self._aliases: dict[str, AliasRecord] = {}
        self._versions: dict[AdapterVersion, VersionRecord] = {}
        self._dropped: set[AdapterVersion] = set()  # that some name has ceased to name; others may still
        self._named_by_aliases: Counter[AdapterVersion] = Counter()
        self.linking = asyncio.Lock()  # held while an alias is led to names, and while a name is taken away

    @property
    def records(self) -> Mapping[str, AdapterRecord]:
        return MappingProxyType(self._records)

    @property
    def aliases(self) -> Mapping[str, AliasRecord]:
        return MappingProxyType(self._aliases)

    def version(self, version: AdapterVersion) -> VersionRecord:
        """KeyError for a version that no name, kept version or alias leads to."""
        return self._versions[version]

    def current(self, name: str) -> AdapterRef | None:
        """What requests for the name get now."""
        return self._registry.describe(name).ref if name in self._registry else None

    def previous_after(self, record: AdapterRecord, new: AdapterVersion, keep: int) -> tuple[AdapterVersion, ...]:
        """What `record` keeps once it stands for `new`: the last `keep` versions, and those that aliases ask for."""
        before = dict.fromkeys(v for v in (record.version, *record.previous) if v is not None and v != new)
        return tuple(version for at, version in enumerate(before) if at < keep or self._named_by_aliases[version])

    def is_wanted(self, version: AdapterVersion) -> bool:
        """A name stands for the version now, or an alias leads or led to it by one: requests may come for it."""
        if self._registry.is_current(version):
            return True
        return self._named_by_aliases[version] > 0 and bool(self._registry.names_of(version))

    def sources(self) -> frozenset[str]:
        """Where the versions that are named, and the names, came from, and what is being loaded on any server."""
        records = self._records.values()
        named = (record.source for record in records if record.source is not None)
        pending = (parse_pending(record.pending).source for record in records if record.pending is not None)
        return frozenset((*named, *pending, *(version.source for version in self._versions.values())))

    def sources_of(self, version: AdapterVersion) -> tuple[str, ...]:
        """Where a version was loaded from, the places that are likelier to hold it still first."""
        names = self._registry.names_of(version)
        standing = (self._records[name] for name in names if self._records[name].version == version)
        known = self._versions.get(version)
        sources = [*(record.source for record in standing), None if known is None else known.source]
        return tuple(dict.fromkeys(source for source in sources if source))

    async def start(self) -> None:
        """Take over what the catalogue holds. Raises CatalogueError."""
        self._take_over(await self._call(self._catalogue.snapshot))
        self._forget_versions()

    async def refresh(self) -> None:
        """Take over what changed since the last look. Raises CatalogueError."""
        try:
            changes = await self._call(lambda: self._catalogue.changes(self._sequence))
        except CatalogueHistoryGone:
            self._take_over(await self._call(self._catalogue.snapshot))
        else:
            if changes.sequence != self._sequence:
                self._follow(changes)
        self._forget_versions()

    async def retried(self, change: Callable[[], Awaitable[_T]]) -> _T:
        """What `change` returns: begun anew, from the records of now, when another server was first with its own."""
        for _ in range(_ATTEMPTS - 1):
            with suppress(ChangedElsewhere):
                return await change()
        return await change()

    async def put(self, record: AdapterRecord, version: VersionRecord | None = None) -> AdapterRecord:
        """Durable, then in force. Raises ChangedElsewhere, CatalogueError, and nothing changed; cancelled: as it was
        before or as it is after, in the catalogue as here. So do the other changes.
        """
        return await to_its_end(self._put(record, version))

    async def delete(self, record: AdapterRecord) -> None:
        await to_its_end(self._delete(record))

    async def put_alias(self, alias: AliasRecord) -> AliasRecord:
        return await to_its_end(self._put_alias(alias))

    async def delete_alias(self, alias: AliasRecord) -> None:
        await to_its_end(self._delete_alias(alias))

    async def _put(self, record: AdapterRecord, version: VersionRecord | None) -> AdapterRecord:
        stored = await self._changed(lambda: self._catalogue.put_adapter(record, version))
        if version is not None:
            self._versions.setdefault(version.version, version)
            self._dropped.add(version.version)  # should the record be an old one by now
        if _is_newer(stored, self._records.get(stored.name)):
            self._mirror_adapter(stored.name, stored)
        self._forget_versions()
        return stored

    async def _delete(self, record: AdapterRecord) -> None:
        await self._changed(lambda: self._catalogue.delete_adapter(record))
        if not _is_newer(self._records.get(record.name), record):
            self._mirror_adapter(record.name, None)
        self._forget_versions()

    async def _put_alias(self, alias: AliasRecord) -> AliasRecord:
        stored = await self._changed(lambda: self._catalogue.put_alias(alias))
        if _is_newer(stored, self._aliases.get(stored.name)):
            self._mirror_alias(stored.name, stored)
        self._forget_versions()
        return stored

    async def _delete_alias(self, alias: AliasRecord) -> None:
        await self._changed(lambda: self._catalogue.delete_alias(alias))
        if not _is_newer(self._aliases.get(alias.name), alias):
            self._mirror_alias(alias.name, None)
        self._forget_versions()

    async def _changed(self, change: Callable[[], _T]) -> _T:
        """A change that another server was ahead of leaves the records as that one made them."""
        try:
            return await self._call(change)
        except CatalogueConflict as error:
            await self.refresh()
            raise ChangedElsewhere(str(error)) from error
        except CatalogueUnavailable as error:
            if not error.outcome_known:
                with suppress(CatalogueError):
                    await self.refresh()
            raise

    async def close(self) -> None:
        await self._call(self._catalogue.close)
        self._thread.shutdown()

    async def _call(self, call: Callable[[], _T]) -> _T:
        """In the catalogue's thread. Answers come back in the order of the calls."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _take_over(self, snapshot: Snapshot) -> None:
        """All there is, whatever was here before: of an earlier time, or of a catalogue that a backup replaced."""
        self._versions |= snapshot.versions
        self._dropped |= self._versions.keys()
        for name in self._records.keys() - snapshot.adapters.keys():
            self._mirror_adapter(name, None)
        for name in self._aliases.keys() - snapshot.aliases.keys():
            self._mirror_alias(name, None)
        for name, record in snapshot.adapters.items():
            if record != self._records.get(name):
                self._mirror_foreign(name, record)
        for name, alias in snapshot.aliases.items():
            if alias != self._aliases.get(name):
                self._mirror_alias(name, alias)
        self._sequence = snapshot.sequence

    def _follow(self, changes: Changes) -> None:
        self._versions |= changes.versions
        self._dropped |= changes.versions.keys()  # whose record may be older than ours
        for name, record in changes.adapters.items():
            if _is_newer(record, self._records.get(name)):
                self._mirror_foreign(name, record)
        for name, alias in changes.aliases.items():
            if _is_newer(alias, self._aliases.get(name)):
                self._mirror_alias(name, alias)
        self._sequence = changes.sequence

    def _mirror_foreign(self, name: str, record: AdapterRecord | None) -> None:
        """Of another server, whose base model may have another name."""
        try:
            self._mirror_adapter(name, record)
        except AdapterNameInvalid as error:
            logger.error("the catalogue has an adapter that cannot be served here: %s", error)
            self._mirror_adapter(name, None)

    def _mirror_adapter(self, name: str, record: AdapterRecord | None) -> None:
        old = self._records.pop(name, None)
        if old is not None:
            self._dropped |= old.named_versions
        if record is not None:
            self._records[name] = record
        if record is not None and record.version is not None:
            previous = tuple(self.ref(record, version) for version in record.previous if version != record.version)
            self._registry.register(self.ref(record, record.version), replace=True, previous=previous)
        elif name in self._registry:
            self._registry.unregister(name)
        self._on_change(name, _versions_of(old, record))

    def _mirror_alias(self, name: str, alias: AliasRecord | None) -> None:
        old = self._aliases.pop(name, None)
        if old is not None:
            self._dropped |= old.named_versions
            self._named_by_aliases.subtract(old.named_versions)
        if alias is not None:
            self._aliases[name] = alias
            self._named_by_aliases.update(alias.named_versions)
        self._on_change(name, _versions_of(old, alias))

    def ref(self, record: AdapterRecord, version: AdapterVersion) -> AdapterRef:
        """A version that `record` names, as the registry knows it."""
        return ref_of(record, self._versions[version])

    def _forget_versions(self) -> None:
        """Those that nothing names, unless a request still uses them. Looks only at what was dropped since, so that a
        change costs as much with thousands of names.
        """
        for version in tuple(self._dropped):
            if not self._registry.is_held(version) and not self._named_by_aliases[version]:
                self._versions.pop(version, None)
                del self._named_by_aliases[version]
        self._dropped = {version for version in self._dropped if self._is_draining(version)}

    def _is_draining(self, version: AdapterVersion) -> bool:
        return self._registry.is_held(version) and not self._registry.names_of(version)

    def check_integrity(self) -> None:
        """Raises AssertionError when registry and records disagree."""
        registered = {name for name, record in self._records.items() if record.version is not None}
        assert registered == set(self._registry), "the registry names what the catalogue does not, or the other way"
        for name in registered:
            assert self._registry.describe(name).ref.version == self._records[name].version, name
        every: list[AdapterRecord | AliasRecord] = [*self._records.values(), *self._aliases.values()]
        named = {version for record in every for version in record.named_versions}
        assert named <= self._versions.keys(), "a version is named and not known"
        assert all(version in named or version in self._dropped for version in self._versions), "nobody will forget it"
        by_aliases = Counter(v for alias in self._aliases.values() for v in alias.named_versions)
        assert by_aliases == +self._named_by_aliases, "aliases are counted wrong"


def ref_of(record: AdapterRecord, known: VersionRecord) -> AdapterRef:
    return AdapterRef(
        name=record.name,
        version=known.version,
        source=record.source or "",
        lora_rank=known.lora_rank,
        num_bytes=known.num_bytes,
        modules=known.modules,
    )


def _versions_of(*records: AdapterRecord | AliasRecord | None) -> frozenset[AdapterVersion]:
    return frozenset(version for each in records if each is not None for version in each.named_versions)


def _is_newer(new: AdapterRecord | AliasRecord | None, old: AdapterRecord | AliasRecord | None) -> bool:
    """Our own changes come back when we look for others', possibly after a later one of ours."""
    return new is None or old is None or new.revision > old.revision
