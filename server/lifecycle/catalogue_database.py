"""Opens the catalogue's database and runs transactions in it; every failure of it becomes a CatalogueError.

Knows the state row (schema version, number of the last change), not what names and versions are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, Engine, Transaction, insert, inspect, make_url, select, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from server.lifecycle.catalogue_errors import CatalogueRefused, CatalogueUnavailable
from server.lifecycle.catalogue_postgres import PostgresBackend
from server.lifecycle.catalogue_sqlite import SQLiteBackend, create_private_file
from server.lifecycle.catalogue_tables import METADATA, SCHEMA_VERSION, STATE

_PATIENCE = 10.0  # seconds

_NEXT_SEQUENCE = (
    update(STATE)
    .where(STATE.c.schema_version == SCHEMA_VERSION)
    .values(sequence=STATE.c.sequence + 1)
    .returning(STATE.c.sequence)
)


class Backend(Protocol):
    """What differs between the databases."""

    place: str  # for messages; no secrets
    reader: Engine
    writer: Engine

    def lock_schema(self, connection: Connection) -> None: ...
    def transaction_id(self, connection: Connection) -> str | None: ...
    def has_committed(self, transaction_id: str | None, failure: BaseException | None) -> bool | None: ...
    def way_out(self, error: BaseException | None) -> str: ...
    def close(self) -> None: ...


class CatalogueDatabase:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @classmethod
    def open(cls, url: str, *, patience: float = _PATIENCE) -> "CatalogueDatabase":
        """Makes the tables when they are not there. Raises CatalogueRefused, CatalogueUnavailable."""
        database = cls(_backend_for(url, patience))
        try:
            database._prepare_schema()
        except BaseException:
            database.close()
            raise
        return database

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """All that is read within is of one moment."""
        with self._translated(), self._backend.reader.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[tuple[Connection, int]]:
        """A transaction and the number of the change it makes. Durable once left; left by an exception, undone.

        The number is taken first and under a lock on its row until the commit, so numbers are committed in their order:
        who has seen number n has seen all below it.
        """
        with self._writing() as connection:
            sequence = connection.scalar(_NEXT_SEQUENCE)
            if sequence is None:
                raise self._wrong_schema()
            yield connection, sequence

    def close(self) -> None:
        self._backend.close()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._translated(), self._backend.writer.connect() as connection, connection.begin() as transaction:
            yield connection
            self._commit(transaction, self._backend.transaction_id(connection))

    def _commit(self, transaction: Transaction, transaction_id: str | None) -> None:
        try:
            transaction.commit()
        except DBAPIError as error:
            committed = self._backend.has_committed(transaction_id, error.orig)
            if committed is None:
                raise self._unavailable(error, outcome_known=False) from error
            if not committed:
                raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The driver's errors, but for those that can only be a fault of ours."""
        try:
            yield
        except (IntegrityError, DataError):
            raise
        except (DBAPIError, PoolTimeout) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: DBAPIError | PoolTimeout, *, outcome_known: bool = True) -> CatalogueUnavailable:
        cause = error.orig if isinstance(error, DBAPIError) else error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        unknown = "" if outcome_known else " Whether the last change was saved is not known."
        message = (
            f"The catalogue {self._backend.place} cannot be used: {reason}. {self._backend.way_out(cause)}.{unknown}"
        )
        return CatalogueUnavailable(message, outcome_known=outcome_known)

    def _prepare_schema(self) -> None:
        if self._schema_version() is None:
            with self._writing() as connection:
                self._backend.lock_schema(connection)
                if not inspect(connection).has_table(STATE.name):  # nobody else was first
                    METADATA.create_all(connection, checkfirst=False)
                    connection.execute(insert(STATE).values(_FIRST_STATE))
        if self._schema_version() != SCHEMA_VERSION:
            raise self._wrong_schema()

    def _schema_version(self) -> int | None:
        with self.read() as connection:
            if not inspect(connection).has_table(STATE.name):
                return None
            return connection.scalar(select(STATE.c.schema_version))

    def _wrong_schema(self) -> CatalogueRefused:
        return CatalogueRefused(
            f"The catalogue {self._backend.place} is of another release: its schema is {self._schema_version()}, this "
            f"one knows {SCHEMA_VERSION}. Start the release that wrote it, or name another catalogue"
        )


_FIRST_STATE = {"id": 1, "schema_version": SCHEMA_VERSION, "sequence": 0, "pruned_through": 0}


def _backend_for(url: str, patience: float) -> Backend:
    parsed = _parsed(url)
    match parsed.get_backend_name():
        case "sqlite":
            backend = SQLiteBackend(parsed, patience=patience)
            create_private_file(Path(backend.place))
            return backend
        case "postgresql" | "postgres":
            return PostgresBackend(parsed, patience=patience)
        case other:
            raise CatalogueRefused(f"{other} cannot hold a catalogue: name a sqlite:/// or a postgresql:// URL")


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except (ArgumentError, ValueError) as error:  # its port may be no number
        raise CatalogueRefused("The catalogue's URL cannot be read: it looks like sqlite:////path/file.db") from error
