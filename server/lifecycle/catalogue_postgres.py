"""The catalogue in PostgreSQL, shared by replicas on many machines. Knows no tables.

Writers wait for each other at the row of `catalogue_state`, so READ COMMITTED is enough for them; readers take a
REPEATABLE READ snapshot. A commit whose answer got lost on the way is settled by asking the server for that
transaction's fate, so that an exception means that nothing changed.
"""

import time
from importlib.util import find_spec
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from server.lifecycle.catalogue_errors import CatalogueRefused

_WAYS_OUT = {
    "08": "See that the server runs and can be reached",
    "28": "See to the user and the password in its URL",
    "3D": "Create the database, or name another in its URL",
    "42": "Its user needs the right to create, read and write the tables catalogue_*",
    "25": "It is read-only, a standby perhaps: name the primary in its URL",
    "53": "It is out of disk, memory or connections",
    "55": "Another server holds its lock; see that none hangs",
    "57": "It is being shut down, or took too long; see to its load",
}
"""Class of an SQLSTATE → what to do."""

_SCHEMA_LOCK = 0x6C6F72616D7578  # "loramux"
_SETTLE_SECONDS = 5.0
_SETTLE_RETRY = 0.1


class PostgresBackend:
    def __init__(self, url: URL, *, patience: float) -> None:
        """`patience`: seconds to wait for the server, and for another one that writes."""
        if find_spec("psycopg") is None:
            raise CatalogueRefused("a catalogue in PostgreSQL needs psycopg: pip install 'loramux[postgres]'")
        self.place = _place(url)
        self._patience = patience
        self._engine = create_engine(
            url.set(drivername="postgresql+psycopg"),
            connect_args=_connect_arguments(url, patience),
            pool_pre_ping=True,  # the server may have been restarted meanwhile
            pool_timeout=patience,
            hide_parameters=True,
        )
        event.listen(self._engine, "connect", self._on_connect)
        self.reader: Engine = self._engine.execution_options(isolation_level="REPEATABLE READ")
        self.writer: Engine = self._engine.execution_options(isolation_level="READ COMMITTED")

    def lock_schema(self, connection: Connection) -> None:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})

    def transaction_id(self, connection: Connection) -> str:
        return str(connection.scalar(text("SELECT pg_current_xact_id()::text")))

    def has_committed(self, transaction_id: str | None, failure: BaseException | None) -> bool | None:
        """The fate of a transaction whose COMMIT was sent; None when the server cannot be asked."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            status = self._status(transaction_id)
            if status in ("committed", "aborted"):
                return status == "committed"
            if time.monotonic() > deadline:
                return None
            time.sleep(_SETTLE_RETRY)

    def way_out(self, error: BaseException | None) -> str:
        state = getattr(error, "sqlstate", None) or "08"  # without one it never got to the server
        return _WAYS_OUT.get(state[:2], "Its log says more")

    def close(self) -> None:
        self._engine.dispose()

    def _status(self, transaction_id: str | None) -> str | None:
        try:
            with self.reader.connect() as connection:
                query = text("SELECT pg_xact_status(CAST(:id AS xid8))")
                status: str | None = connection.scalar(query, {"id": transaction_id})
                return status
        except DBAPIError:
            return None

    def _on_connect(self, connection: Any, _record: Any) -> None:
        """Nobody who hangs keeps the others waiting for ever, and a commit that returned is durable.

        Where the server waits for its standbys too, it stays so.
        """
        milliseconds = round(self._patience * 1000)
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = {milliseconds}")
            cursor.execute(f"SET idle_in_transaction_session_timeout = {milliseconds}")
            cursor.execute(f"SET statement_timeout = {3 * milliseconds}")
            cursor.execute("SHOW synchronous_commit")
            if cursor.fetchone()[0] == "off":
                cursor.execute("SET synchronous_commit = on")
        connection.autocommit = False


def _connect_arguments(url: URL, patience: float) -> dict[str, int]:
    """Of libpq, in seconds and milliseconds; what the URL says itself goes first."""
    ours = {
        "connect_timeout": max(2, round(patience)),
        "tcp_user_timeout": round(patience * 1000),
        "keepalives_idle": 10,
        "keepalives_interval": 5,
    }
    return {name: value for name, value in ours.items() if name not in url.query}


def _place(url: URL) -> str:
    """Without user, password, and whatever else may be secret among the parameters."""
    host = url.host or url.query.get("host") or "localhost"
    return f"postgresql://{host}{f':{url.port}' if url.port else ''}/{url.database or ''}"
