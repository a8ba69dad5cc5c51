"""One name's change inside a write transaction: compare with what stands, write it, keep the use of versions exact.

Runs only under the writers' lock (catalogue_database.py), so what was read stays true until the commit.
"""

from collections.abc import Collection

from sqlalchemy import Connection, bindparam, delete, exists, insert, literal_column, select, update

from adapters.adapter_ref import AdapterVersion
from adapters.untrusted_json import shown
from server.lifecycle.catalogue_errors import CatalogueConflict
from server.lifecycle.catalogue_links import check_leads_somewhere, check_may_put, check_may_remove
from server.lifecycle.catalogue_records import AdapterRecord, AliasRecord, VersionRecord
from server.lifecycle.catalogue_rows import record_text, version_values
from server.lifecycle.catalogue_tables import ADAPTER, ALIAS, GONE, NAMES, STATE, VERSION_USES, VERSIONS

_STANDING = select(NAMES.c.kind, NAMES.c.sequence).where(NAMES.c.name == bindparam("of_name"))
_UPDATE = update(NAMES).where(NAMES.c.name == bindparam("of_name"))
_USES = select(VERSION_USES.c.version).where(VERSION_USES.c.name == bindparam("of_name"))
_KINDS = {ADAPTER: "an adapter", ALIAS: "an alias"}


class NameChange:
    """Change number `sequence`, on the connection of its transaction."""

    def __init__(self, connection: Connection, sequence: int) -> None:
        self._connection = connection
        self._sequence = sequence

    def put(self, record: AdapterRecord | AliasRecord, new_version: VersionRecord | None = None) -> None:
        kind = _kind_of(record)
        stood = self._check_unchanged(kind, record)
        if isinstance(record, AdapterRecord):
            check_may_put(self._connection, record)
        else:
            check_leads_somewhere(self._connection, record)
        self._write(record.name, kind, record_text(record), is_new=stood is None)
        if new_version is not None:
            self._add_version(new_version)
        self._settle_uses(record.name, record.named_versions)

    def remove(self, record: AdapterRecord | AliasRecord) -> None:
        if self._check_unchanged(_kind_of(record), record) in (None, GONE):
            raise CatalogueConflict(f"'{shown(record.name)}' was never put, so it cannot be deleted")
        if isinstance(record, AdapterRecord):
            check_may_remove(self._connection, record)
        self._write(record.name, GONE, "{}", is_new=False)
        self._settle_uses(record.name, frozenset())

    def prune(self, kept_changes: int) -> None:
        """Forget deletions older than the last `kept_changes` changes, and that there were such."""
        through = self._sequence - kept_changes
        old = (NAMES.c.kind == literal_column(f"'{GONE}'")) & (NAMES.c.sequence <= through)  # as its index says it
        if self._connection.execute(delete(NAMES).where(old)).rowcount:
            self._connection.execute(update(STATE).values(pruned_through=through))

    def _check_unchanged(self, kind: str, record: AdapterRecord | AliasRecord) -> str | None:
        """What kind of name stands there now; None = none ever did. Raises CatalogueConflict."""
        row = self._connection.execute(_STANDING, {"of_name": record.name}).one_or_none()
        stands, revision = (None, 0) if row is None else (row.kind, row.sequence)
        if stands in _KINDS and stands != kind:
            raise CatalogueConflict(f"'{shown(record.name)}' is {_KINDS[stands]}'s name already; choose another")
        if record.revision != (revision if stands == kind else 0):
            now = "is gone" if stands in (None, GONE) else f"is at revision {revision}"
            raise CatalogueConflict(
                f"'{shown(record.name)}' was changed by somebody else: revision {record.revision} was expected, and it "
                f"{now}. Read it and try again"
            )
        return stands

    def _write(self, name: str, kind: str, text: str, *, is_new: bool) -> None:
        values = {"kind": kind, "sequence": self._sequence, "record": text}
        if is_new:
            self._connection.execute(insert(NAMES), {"name": name, **values})
        else:
            self._connection.execute(_UPDATE, {"of_name": name, **values})

    def _add_version(self, version: VersionRecord) -> None:
        known = select(VERSIONS.c.version).where(VERSIONS.c.version == version.version)
        if self._connection.scalar(known) is None:
            self._connection.execute(insert(VERSIONS), version_values(version))

    def _settle_uses(self, name: str, named: Collection[AdapterVersion]) -> None:
        """Make the rows of uses those of `named`, and delete the versions that nobody uses any more."""
        stood = set(self._connection.scalars(_USES, {"of_name": name}))
        if added := set(named) - stood:
            self._check_known(added)
            self._connection.execute(insert(VERSION_USES), [{"name": name, "version": v} for v in sorted(added)])
        if dropped := stood - set(named):
            uses = VERSION_USES.c
            self._connection.execute(delete(VERSION_USES).where((uses.name == name) & uses.version.in_(dropped)))
            unused = ~exists().where(uses.version == VERSIONS.c.version)
            self._connection.execute(delete(VERSIONS).where(VERSIONS.c.version.in_(dropped) & unused))

    def _check_known(self, versions: Collection[str]) -> None:
        known = set(self._connection.scalars(select(VERSIONS.c.version).where(VERSIONS.c.version.in_(versions))))
        for version in sorted(set(versions) - known):
            raise CatalogueConflict(f"version {shown(version)} is not in the catalogue any more; load it again")


def _kind_of(record: AdapterRecord | AliasRecord) -> str:
    return ADAPTER if isinstance(record, AdapterRecord) else ALIAS
