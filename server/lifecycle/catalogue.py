"""The durable registry: which adapters and aliases are wanted, in which versions. The truth that replicas share.

Synchronous; a call that returned is on disk, one that raised changed nothing. Everybody reads `snapshot()` once and
then polls `changes(after)`. A writer puts back the record it read with what it wants different; when somebody else was
first it gets CatalogueConflict instead. So does who would take away what an alias leads to, or lead one to what is not
there. Knows no weights, no files of adapters, no event loop.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from sqlalchemy import Connection, Select, select

from server.lifecycle.catalogue_database import CatalogueDatabase
from server.lifecycle.catalogue_errors import CatalogueHistoryGone
from server.lifecycle.catalogue_names import NameChange
from server.lifecycle.catalogue_records import AdapterRecord, AliasRecord, Changes, Snapshot, VersionRecord
from server.lifecycle.catalogue_rows import VersionReader, adapter_of, alias_of
from server.lifecycle.catalogue_tables import ADAPTER, ALIAS, GONE, NAMES, STATE, VERSION_USES, VERSIONS

_KEPT_CHANGES = 100_000  # how far back deletions are remembered: an hour of 27 changes a second

_STATE = select(STATE.c.sequence, STATE.c.pruned_through)
_NAMES = select(NAMES.c.name, NAMES.c.kind, NAMES.c.sequence, NAMES.c.record)
_VERSIONS = select(
    VERSIONS.c.version,
    VERSIONS.c.lora_rank,
    VERSIONS.c.num_bytes,
    VERSIONS.c.modules,
    VERSIONS.c.report,
    VERSIONS.c.source,
)


_Record = TypeVar("_Record", AdapterRecord, AliasRecord)


class Catalogue:
    def __init__(
        self,
        database: CatalogueDatabase,
        *,
        kept_changes: int = _KEPT_CHANGES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._kept_changes = kept_changes
        self._clock = clock

    @classmethod
    def open(cls, url: str) -> "Catalogue":
        """sqlite:////absolute/path.db or postgresql://user@host/database. Raises CatalogueError."""
        return cls(CatalogueDatabase.open(url))

    def snapshot(self) -> Snapshot:
        with self._database.read() as connection:
            sequence = connection.execute(_STATE).one().sequence
            names = connection.execute(_NAMES.where(NAMES.c.kind != GONE))
            adapters, aliases = _records(names)
            versions = _versions(connection, _VERSIONS)
        return Snapshot(sequence, _present(adapters), _present(aliases), versions)

    def changes(self, after: int) -> Changes:
        """What is different since `after`, a sequence number of an earlier answer. One small query when nothing is.

        Raises CatalogueHistoryGone when that is so long ago that deletions since are forgotten, or when this is not the
        catalogue it came from (a backup was brought back): take a snapshot.
        """
        with self._database.read() as connection:
            sequence, pruned_through = connection.execute(_STATE).one()
            if after == sequence:
                return Changes(sequence, {}, {}, {})
            if not pruned_through <= after < sequence:
                raise CatalogueHistoryGone(
                    f"The catalogue has changes {pruned_through} to {sequence}, not those after {after}; read it anew"
                )
            adapters, aliases = _records(connection.execute(_NAMES.where(NAMES.c.sequence > after)))
            versions = _versions(connection, _VERSIONS.where(VERSIONS.c.version.in_(_used_since(after))))
        return Changes(sequence, adapters, aliases, versions)

    def put_adapter(self, record: AdapterRecord, version: VersionRecord | None = None) -> AdapterRecord:
        """Insert when `record.revision` is 0, else replace that very revision; returns what stands there now.

        `version` is told of when it may be new; one the catalogue has is left as it is. Raises CatalogueConflict, also
        when the record gives up a version that an alias names by this name.
        """
        if version is not None and version.version not in record.named_versions:
            raise ValueError(f"version {version.version} is not among those that adapter {record.name} names")
        now = self._clock()
        with self._database.write() as (connection, sequence):
            written = replace(record, updated_at=now, created_at=record.created_at or now)
            NameChange(connection, sequence).put(written, version)
        return replace(written, revision=sequence)

    def delete_adapter(self, record: AdapterRecord) -> None:
        """Raises CatalogueConflict when the name is at another revision, or an alias leads to it."""
        self._delete(record)

    def put_alias(self, record: AliasRecord) -> AliasRecord:
        """As `put_adapter`. Targets must be adapters that were loaded, and have the versions asked for; what the alias
        led to before need not, but its versions must be known.
        """
        with self._database.write() as (connection, sequence):
            NameChange(connection, sequence).put(record)
        return replace(record, revision=sequence)

    def delete_alias(self, record: AliasRecord) -> None:
        self._delete(record)

    def close(self) -> None:
        self._database.close()

    def _delete(self, record: AdapterRecord | AliasRecord) -> None:
        with self._database.write() as (connection, sequence):
            change = NameChange(connection, sequence)
            change.remove(record)
            change.prune(self._kept_changes)


def _used_since(after: int) -> Select[tuple[str]]:
    names = select(NAMES.c.name).where(NAMES.c.sequence > after)
    return select(VERSION_USES.c.version).where(VERSION_USES.c.name.in_(names))


def _versions(connection: Connection, query: Select[Any]) -> dict[Any, VersionRecord]:
    read = VersionReader()
    return {row[0]: read(row) for row in connection.execute(query)}


def _records(
    rows: Iterable[tuple[str, str, int, str]],
) -> tuple[dict[str, AdapterRecord | None], dict[str, AliasRecord | None]]:
    """Every name in both, None where it is not of that kind."""
    adapters: dict[str, AdapterRecord | None] = {}
    aliases: dict[str, AliasRecord | None] = {}
    for name, kind, sequence, text in rows:
        adapters[name] = adapter_of(name, sequence, text) if kind == ADAPTER else None
        aliases[name] = alias_of(name, sequence, text) if kind == ALIAS else None
    return adapters, aliases


def _present(records: dict[str, _Record | None]) -> dict[str, _Record]:
    return {name: record for name, record in records.items() if record is not None}
