"""A database that is full, broken, locked, read-only, away, or cut off in a commit: a clear error, nothing changed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from server.lifecycle.catalogue import Catalogue
from server.lifecycle.catalogue_database import CatalogueDatabase
from server.lifecycle.catalogue_errors import CatalogueUnavailable
from server.lifecycle.catalogue_records import Snapshot
from tests.server.lifecycle.catalogue_world import adapter, check_integrity, version_of, version_record
from tests.server.lifecycle.catalogue_writers import fork_server, tell_what_fails_for_nobody
from tests.server.lifecycle.cutting_proxy import Cut, CuttingProxy
from tests.server.lifecycle.postgres_server import PostgresServer

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent

OpenCatalogue = Callable[[str], Catalogue]


def put_until_it_fails(catalogue: Catalogue) -> tuple[Snapshot, CatalogueUnavailable]:
    """What stood before the change that failed; each takes the place of the one before and some 40 KB more."""
    for number in range(1, 10_000):
        stands = catalogue.snapshot()
        try:
            catalogue.put_adapter(adapter(f"n{number}", number, pending="x" * 40_000), version_record(number))
        except CatalogueUnavailable as error:
            return stands, error
    raise AssertionError("it never failed")


# A disk that is full or broken.


@pytest.mark.slow
def test_every_call_to_the_disk_may_fail(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler, or no /proc, to make the disk's calls fail with")
    library = tmp_path / "failing_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "failing_disk.c", "-ldl"], check=True)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.server.lifecycle.catalogue_on_failing_disk",
            f"sqlite:///{tmp_path}/catalogue.db",
        ],
        env={**os.environ, "LD_PRELOAD": str(library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hit = json.loads(done.stdout)
    assert min(hit[f"{phase} failed"] for phase in ("open", "put", "delete")) > 5, hit
    assert min(hit[f"{phase} done"] for phase in ("put", "delete", "close")) > 5, hit  # in moving the log: it can wait


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        _fill_and_free(disk)
    finally:
        subprocess.run(["umount", disk], check=True)


def _fill_and_free(disk: Path) -> None:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(400_000))
    catalogue = Catalogue.open(f"sqlite:///{disk}/catalogue.db")
    stood, error = put_until_it_fails(catalogue)
    assert str(disk) in error.message
    assert "Free some space" in error.message
    assert catalogue.snapshot() == stood
    ballast.unlink()
    added = catalogue.put_adapter(adapter("later", 0), version_record(0))
    catalogue.close()
    again = Catalogue.open(f"sqlite:///{disk}/catalogue.db")
    assert again.snapshot().adapters == {**stood.adapters, "later": added}
    check_integrity(again.snapshot())
    again.close()


def test_a_file_at_its_limit(sqlite_url: str, open_catalogue: OpenCatalogue) -> None:
    catalogue = open_catalogue(sqlite_url)
    with catalogue._database.read() as connection:  # the one connection that is kept
        connection.exec_driver_sql("PRAGMA max_page_count = 100")
    stood, error = put_until_it_fails(catalogue)
    assert (error.status, error.code, error.retry_after) == (503, "catalogue_unavailable", 5)
    assert error.outcome_known
    assert sqlite_url.removeprefix("sqlite:///") in error.message
    assert "Free some space" in error.message
    assert catalogue.snapshot() == open_catalogue(sqlite_url).snapshot() == stood
    catalogue.delete_adapter(stood.adapters["n1"])
    catalogue.put_adapter(adapter("later", 0), version_record(0))
    check_integrity(catalogue.snapshot())


# What the server may not do.


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """pytest's own are closed to other users."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_it_may_not_write(public_folder: Path, is_there: bool, open_catalogue: OpenCatalogue) -> None:
    file = public_folder / "catalogue.db"
    if is_there:
        open_catalogue(f"sqlite:///{file}").put_adapter(adapter("sql"))
        for part in public_folder.iterdir():
            part.chmod(0o444)
    public_folder.chmod(0o555)
    context = fork_server()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=tell_what_fails_for_nobody, args=(f"sqlite:///{file}", sending))
    process.start()
    name, message = receiving.recv()
    process.join()
    assert name == "CatalogueUnavailable", message
    assert str(file) in message
    assert "writable by the server" in message


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CatalogueUnavailable, match="Its folder must exist"):
        Catalogue.open(f"sqlite:///{tmp_path}/nowhere/catalogue.db")


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    file = tmp_path / "catalogue.db"
    file.write_bytes(b"name: sql\n" * 1000)
    with pytest.raises(CatalogueUnavailable, match="The file is something else"):
        Catalogue.open(f"sqlite:///{file}")
    assert file.read_bytes() == b"name: sql\n" * 1000


def test_a_damaged_file(sqlite_url: str, tmp_path: Path) -> None:
    catalogue = Catalogue.open(sqlite_url)
    for number in range(50):
        catalogue.put_adapter(adapter(f"n{number}", number), version_record(number))
    catalogue.close()
    file = tmp_path / "catalogue.db"
    with file.open("r+b") as content:
        content.seek(4096)
        content.write(b"\xff" * (file.stat().st_size - 4096))
    with pytest.raises(CatalogueUnavailable, match="The file is damaged"):
        Catalogue.open(sqlite_url)


# Others who hold it.


def test_a_writer_that_hangs(catalogue_url: str) -> None:
    impatient, hanging = (Catalogue(CatalogueDatabase.open(catalogue_url, patience=p)) for p in (0.3, 30))
    with hanging._database.write():
        with pytest.raises(CatalogueUnavailable, match="Another (process|server) holds it") as failed:
            impatient.put_adapter(adapter("sql"))
        assert failed.value.outcome_known
        assert impatient.snapshot().adapters == {}
    written = impatient.put_adapter(adapter("sql"))
    assert hanging.snapshot().adapters == {"sql": written}
    impatient.close()
    hanging.close()


# A server that is away.


def test_no_server_and_no_secret_in_the_message(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    for url in (
        f"postgresql+psycopg://user:hunter2@/db?host={tmp_path}",
        f"postgresql://user@/db?host={tmp_path}&password=hunter2",
        "postgres://user:hunter2@127.0.0.1:1/db",
    ):
        with pytest.raises(CatalogueUnavailable, match="See that the server runs") as failed:
            Catalogue.open(url)
        assert "hunter2" not in failed.value.message
        assert "/db" in failed.value.message


@pytest.fixture
def proxy(postgres: PostgresServer) -> Iterator[CuttingProxy]:
    folder = Path(tempfile.mkdtemp(prefix="px"))
    proxy = CuttingProxy(folder, postgres.folder)
    yield proxy
    proxy.close()
    shutil.rmtree(folder)


@pytest.mark.parametrize("stays_cut", [False, True])
@pytest.mark.parametrize("cut", ["before the commit", "after the commit"])
def test_a_line_cut_in_a_commit(
    postgres: PostgresServer, proxy: CuttingProxy, cut: Cut, stays_cut: bool, open_catalogue: OpenCatalogue
) -> None:
    """The exception tells whether the change was made, whichever side of it was lost; or says that it cannot."""
    url = postgres.new_url()
    other = open_catalogue(url)
    catalogue = open_catalogue(url.replace(f"host={postgres.folder}", f"host={proxy.folder}"))
    first = catalogue.put_adapter(adapter("sql", 1), version_record(1))
    proxy.cut, proxy.stays_cut = cut, stays_cut
    error = _failure_of(lambda: catalogue.put_adapter(replace(first, version=version_of(2)), version_record(2)))
    assert proxy.num_cut == 1
    assert (other.snapshot().adapters["sql"] != first) == (cut == "after the commit")
    if stays_cut:
        assert error is not None
        assert not error.outcome_known
        assert "is not known" in error.message
    else:
        assert (error is None) == (cut == "after the commit")
        assert error is None or error.outcome_known
    proxy.cut, proxy.stays_cut = "never", False
    check_integrity(catalogue.snapshot())
    assert catalogue.put_adapter(adapter("later")) == other.snapshot().adapters["later"]


def _failure_of(change: Callable[[], object]) -> CatalogueUnavailable | None:
    try:
        change()
    except CatalogueUnavailable as error:
        return error
    return None


def test_a_server_that_was_restarted_meanwhile(postgres: PostgresServer, open_catalogue: OpenCatalogue) -> None:
    catalogue = open_catalogue(postgres.new_url())
    catalogue.put_adapter(adapter("sql"))
    postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    catalogue.put_adapter(adapter("later"))
    assert catalogue.snapshot().adapters.keys() == {"sql", "later"}


def test_a_server_that_does_not_sync_commits_is_asked_to(
    postgres: PostgresServer, open_catalogue: OpenCatalogue
) -> None:
    url = postgres.new_url().replace("options=", "options=-csynchronous_commit%3Doff%20")
    with open_catalogue(url)._database.read() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
