"""What aliases lead to, looked at inside a write transaction: nobody takes it away, and nobody leads to what is gone.

An alias and the adapter it leads to are rows of their own, so neither's revision tells of a change of the other; two
servers that have not heard of each other yet would each change one of them. Runs only under the writers' lock
(catalogue_database.py), so whoever is second sees what the first did. Knows nothing of revisions.
"""

import json
from itertools import chain

from sqlalchemy import Connection, bindparam, exists, literal_column, select

from adapters.untrusted_json import shown
from server.lifecycle.catalogue_errors import CatalogueConflict
from server.lifecycle.catalogue_records import AdapterRecord, AliasRecord
from server.lifecycle.catalogue_rows import alias_of
from server.lifecycle.catalogue_tables import ADAPTER, ALIAS, NAMES, VERSION_USES

_USES = VERSION_USES.c
_IS_ALIAS = NAMES.c.kind == literal_column(f"'{ALIAS}'")  # as its index says it
_ALIASES = select(NAMES.c.name, NAMES.c.sequence, NAMES.c.record).where(_IS_ALIAS)
_TAKEN_FROM = select(_USES.version).where(
    (_USES.name == bindparam("of_name")) & _USES.version.not_in(bindparam("kept", expanding=True))
)
_NAMED_BY = (
    select(_USES.name, _USES.version)
    .join(NAMES, NAMES.c.name == _USES.name)
    .where((NAMES.c.kind == ADAPTER) & NAMES.c.name.in_(bindparam("adapters", expanding=True)))
)


def check_leads_somewhere(connection: Connection, alias: AliasRecord) -> None:
    """Raises CatalogueConflict unless every target is an adapter that was loaded, and has the version asked for.

    Not what the alias led to before: that is allowed to go.
    """
    rows = connection.execute(_NAMED_BY, {"adapters": sorted({target.adapter for target in alias.targets})})
    named = {(name, version) for name, version in rows}
    loaded = {name for name, _version in named}
    for target in alias.targets:
        if target.adapter not in loaded:
            raise CatalogueConflict(f"'{shown(target.adapter)}' is no adapter that was loaded; an alias leads to such")
        if target.version is not None and (target.adapter, target.version) not in named:
            raise CatalogueConflict(f"'{shown(target.adapter)}' neither is nor keeps version {shown(target.version)}")


def check_may_put(connection: Connection, adapter: AdapterRecord) -> None:
    """Raises CatalogueConflict when the record gives up a version of the name that an alias leads to, or led to before.

    Both are kept on disk beyond the number, so that the alias can be rolled back.
    """
    kept = {"of_name": adapter.name, "kept": sorted(adapter.named_versions)}
    taken = set(connection.scalars(_TAKEN_FROM, kept))
    if not taken:
        return
    names_one = exists().where((_USES.name == NAMES.c.name) & _USES.version.in_(taken))
    for row in connection.execute(_ALIASES.where(names_one)):
        alias = alias_of(*row)
        if any(
            target.adapter == adapter.name and target.version in taken
            for target in chain(alias.targets, *alias.previous)
        ):
            raise CatalogueConflict(f"the alias '{shown(alias.name)}' names a version of '{shown(adapter.name)}'")


def check_may_remove(connection: Connection, adapter: AdapterRecord) -> None:
    """Raises CatalogueConflict when an alias leads to the name. One that only led there before keeps nothing."""
    mentions_it = NAMES.c.record.contains(json.dumps(adapter.name), autoescape=True)  # so that few have to be read
    for row in connection.execute(_ALIASES.where(mentions_it)):
        alias = alias_of(*row)
        if any(target.adapter == adapter.name for target in alias.targets):
            raise CatalogueConflict(f"the alias '{shown(alias.name)}' leads to '{shown(adapter.name)}'")
