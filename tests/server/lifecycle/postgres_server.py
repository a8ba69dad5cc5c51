"""A PostgreSQL server of the tests' own, from the programs the system has, in a temporary folder behind a socket."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from sqlalchemy import create_engine, text

_START_SECONDS = 60.0
_ROLE = "loramux"


def find_programs() -> Path | None:
    """The folder with initdb and postgres, of the newest release installed."""
    on_path = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    candidates = [*folders[::-1], *([Path(on_path).resolve().parent] if on_path else [])]
    return next((folder for folder in candidates if (folder / "initdb").exists()), None)


class PostgresServer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of the socket too
        self._engine = create_engine(self._url(), isolation_level="AUTOCOMMIT")

    def new_url(self, **parameters: str) -> str:
        """A catalogue of its own: a fresh schema, which the URL makes the one that is used."""
        schema = f"t{uuid4().hex}"
        self.execute(f"CREATE SCHEMA {schema}")
        more = "".join(f"&{name}={value}" for name, value in parameters.items())
        return f"{self._url()}&options=-csearch_path%3D{schema}{more}"

    def execute(self, statement: str) -> None:
        with self._engine.connect() as connection:
            connection.execute(text(statement))

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return self.execute("SELECT 1")
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def close(self) -> None:
        self._engine.dispose()

    def _url(self) -> str:
        return f"postgresql+psycopg://{_ROLE}@/postgres?host={self.folder}"


@contextmanager
def running_postgres(programs: Path) -> Iterator[PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a short path: a socket's has 107 bytes at most
    identity = _identity()
    if identity:
        os.chown(folder, identity["user"], identity["group"])
    try:
        initdb = [programs / "initdb", "-D", folder / "data", "-U", _ROLE, "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **identity)  # type: ignore[call-overload]
        settings = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "max_connections=40"]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(  # type: ignore[call-overload]
                [programs / "postgres", "-D", folder / "data", *settings],
                stdout=log,
                stderr=log,
                cwd=folder,
                **identity,
            )
        try:
            server = PostgresServer(folder)
            server.wait_until_ready()
            yield server
            server.close()
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _identity() -> dict[str, int]:
    """PostgreSQL refuses to run as root: somebody else then."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid}
    raise LookupError("no user but root to run PostgreSQL as")
