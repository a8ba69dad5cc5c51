"""The catalogue in a SQLite file: one server, or several on one machine. Knows no tables.

Write-ahead log, synchronous=FULL: a commit that returned is on disk, readers and the writer do not wait for each other,
and a killed process leaves nothing half done. The driver's own habit of opening transactions late, and not at all for
SELECT, is turned off: `BEGIN` for reading, `BEGIN IMMEDIATE` for writing come from here. (IMMEDIATE, because a
transaction that read first and then writes is refused, not queued, when another one wrote in between.)
"""

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from server.lifecycle.catalogue_errors import CatalogueRefused

_WAYS_OUT = {
    "SQLITE_FULL": "Free some space on that disk",
    "SQLITE_BUSY": "Another process holds it; see that none hangs there",
    "SQLITE_LOCKED": "Another process holds it; see that none hangs there",
    "SQLITE_READONLY": "The file, its folder and its -wal and -shm files must be writable by the server",
    "SQLITE_CANTOPEN": "Its folder must exist and be writable by the server",
    "SQLITE_PERM": "Its folder must be writable by the server",
    "SQLITE_IOERR": "The disk reports errors, or its quota is used up: look into the system's log",
    "SQLITE_CORRUPT": "The file is damaged: bring back a copy of it, or move it aside to begin anew",
    "SQLITE_NOTADB": "The file is something else: name another, or move it aside to begin anew",
}
"""First two words of SQLite's name for an error → what to do."""

_MODE_RETRY = 0.02  # seconds
_BUSY = "SQLITE_BUSY"


class SQLiteBackend:
    def __init__(self, url: URL, *, patience: float) -> None:
        """`patience`: seconds to wait for another process that writes."""
        if not url.database or not Path(url.database).is_absolute() or url.query:
            raise CatalogueRefused(
                "a catalogue in SQLite is a file with an absolute path: sqlite:////var/lib/loramux/catalogue.db"
            )
        self.place = url.database
        self._patience = patience
        self._engine = create_engine(
            url.set(drivername="sqlite+pysqlite"), connect_args={"timeout": patience}, hide_parameters=True
        )
        event.listen(self._engine, "connect", self._on_connect)
        event.listen(self._engine, "begin", _begin)
        self.reader: Engine = self._engine.execution_options(begin="BEGIN")
        self.writer: Engine = self._engine.execution_options(begin="BEGIN IMMEDIATE")

    def lock_schema(self, connection: Connection) -> None:
        """Nothing to do: BEGIN IMMEDIATE did."""

    def transaction_id(self, connection: Connection) -> None:
        """None is needed."""

    def has_committed(self, transaction_id: str | None, failure: BaseException | None) -> bool | None:
        """A commit that failed did not happen; but one whose sync failed lies whole in the log, unseen.

        A crash would bring it to life, so it is overwritten by the next commit, made here; None when that fails too.
        """
        if getattr(failure, "sqlite_errorname", "") != "SQLITE_IOERR_FSYNC":
            return False
        try:
            with self.writer.begin() as connection:
                connection.exec_driver_sql("PRAGMA user_version = 0")  # changes nothing, and is written all the same
        except DBAPIError:
            return None
        return False

    def way_out(self, error: BaseException | None) -> str:
        name = getattr(error, "sqlite_errorname", None) or ""
        return _WAYS_OUT.get("_".join(name.split("_")[:2]), "See that it is a file the server can write")

    def close(self) -> None:
        self._engine.dispose()

    def _on_connect(self, connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        self._use_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    def _use_write_ahead_log(self, connection: sqlite3.Connection) -> None:
        """The mode lasts in the file. Changing it is the one thing SQLite does not wait for others with."""
        deadline = time.monotonic() + self._patience
        while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            except sqlite3.OperationalError as error:
                if not error.sqlite_errorname.startswith(_BUSY) or time.monotonic() > deadline:
                    raise
                time.sleep(_MODE_RETRY)
            else:
                if mode != "wal":
                    raise CatalogueRefused(
                        f"{self.place} is on a file system without shared memory, which SQLite's write-ahead log needs "
                        "(a network file system?). Put it on a local disk, or use PostgreSQL"
                    )


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options()["begin"])


def create_private_file(path: Path) -> None:
    """Sources may hold what is not everybody's, so only the owner reads it; the -wal and -shm files follow its mode."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError:
        return  # there already; or SQLite says what is wrong when it opens it
