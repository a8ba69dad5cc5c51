"""The catalogue's tables, the same on SQLite and PostgreSQL. Knows no records and no connections.

One row of `catalogue_names` per name, whatever it is: so the primary key keeps adapters and aliases in one name space,
and one index answers what changed. A deleted name stays as a tombstone ("gone") for those who poll. A record is JSON
in a text column: floats that JSON does not have (a norm may overflow to infinity) and any source survive on both.
"""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
)

SCHEMA_VERSION = 1
"""Raise it with any change of the tables or of a record's fields: an older server would lose what it does not know."""

ADAPTER, ALIAS, GONE = "adapter", "alias", "gone"

METADATA = MetaData()

STATE = Table(
    "catalogue_state",
    METADATA,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
    Column("schema_version", Integer, nullable=False),
    Column("sequence", BigInteger, nullable=False),  # number of the last change
    Column("pruned_through", BigInteger, nullable=False),  # of tombstones up to here some are deleted
)
"""One row. Every writer updates it first, so writers come one after the other and numbers are committed in order."""

VERSIONS = Table(
    "catalogue_versions",
    METADATA,
    Column("version", Text, primary_key=True),
    Column("lora_rank", Integer, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("modules", Text, nullable=False),  # JSON list
    Column("report", Text, nullable=False),  # JSON object
    Column("source", Text, nullable=False),
)

NAMES = Table(
    "catalogue_names",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("kind", Text, CheckConstraint(f"kind IN ('{ADAPTER}', '{ALIAS}', '{GONE}')"), nullable=False),
    Column("sequence", BigInteger, nullable=False),  # number of its last change, which is its revision
    Column("record", Text, nullable=False),  # JSON object
)
Index("catalogue_names_sequence", NAMES.c.sequence, unique=True)
Index(
    "catalogue_names_gone",
    NAMES.c.sequence,
    sqlite_where=NAMES.c.kind == GONE,
    postgresql_where=NAMES.c.kind == GONE,
)  # pruning looks at tombstones only
Index(
    "catalogue_names_alias",
    NAMES.c.name,
    sqlite_where=NAMES.c.kind == ALIAS,
    postgresql_where=NAMES.c.kind == ALIAS,
)  # a change of an adapter looks at the aliases, which are few

VERSION_USES = Table(
    "catalogue_version_uses",
    METADATA,
    Column("name", Text, ForeignKey(NAMES.c.name), primary_key=True),
    Column("version", Text, ForeignKey(VERSIONS.c.version), primary_key=True),
)
Index("catalogue_version_uses_version", VERSION_USES.c.version)
