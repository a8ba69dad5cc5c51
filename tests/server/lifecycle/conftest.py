"""Where the tests of the catalogue keep it: each test of `catalogue_url` runs on SQLite and on PostgreSQL."""

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from server.lifecycle.catalogue import Catalogue
from tests.server.lifecycle.postgres_server import PostgresServer, find_programs, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt install postgresql)")
    if find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (the extra `postgres`)")
    with running_postgres(programs) as server:
        yield server


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/catalogue.db"


@pytest.fixture(params=["sqlite", "postgres"])
def catalogue_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_url"))
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_url()


@pytest.fixture
def open_catalogue() -> Iterator[Callable[[str], Catalogue]]:
    """Opens catalogues and closes them after the test."""
    with contextlib.ExitStack() as stack:

        def opened(url: str) -> Catalogue:
            catalogue = Catalogue.open(url)
            stack.callback(catalogue.close)
            return catalogue

        yield opened


@pytest.fixture
def catalogue(catalogue_url: str, open_catalogue: Callable[[str], Catalogue]) -> Catalogue:
    return open_catalogue(catalogue_url)


@pytest.fixture
def replica(catalogue: Catalogue, catalogue_url: str, open_catalogue: Callable[[str], Catalogue]) -> Catalogue:
    """Another server on the same database."""
    return open_catalogue(catalogue_url)
