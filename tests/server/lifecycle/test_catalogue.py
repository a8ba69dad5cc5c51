"""What the catalogue promises, on both databases: round trips, compare-and-set, one name space, versions, changes."""

import math
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine, insert, text, update

from server.lifecycle.catalogue import Catalogue
from server.lifecycle.catalogue_database import CatalogueDatabase
from server.lifecycle.catalogue_errors import CatalogueConflict, CatalogueHistoryGone, CatalogueRefused
from server.lifecycle.catalogue_records import AdapterRecord, AliasRecord, AliasTarget
from server.lifecycle.catalogue_rows import record_text, version_values
from server.lifecycle.catalogue_tables import ADAPTER, NAMES, STATE, VERSION_USES, VERSIONS
from tests.server.lifecycle.catalogue_world import (
    Follower,
    adapter,
    check_integrity,
    version_of,
    version_record,
)

OpenCatalogue = Callable[[str], Catalogue]


def alias(name: str, *targets: AliasTarget, **fields: object) -> AliasRecord:
    return AliasRecord(name=name, targets=targets, **fields)  # type: ignore[arg-type]


# Round trips.


def test_a_new_catalogue_is_empty(catalogue: Catalogue) -> None:
    snapshot = catalogue.snapshot()
    assert (snapshot.sequence, snapshot.adapters, snapshot.aliases, snapshot.versions) == (0, {}, {}, {})
    assert catalogue.changes(0).sequence == 0


FULL_ADAPTER = AdapterRecord(
    name="sql",
    source="hf://org/repo@main/ünï \x00'\"\\",
    version=version_of(1),
    previous=(version_of(2), version_of(3)),
    pending="/other",
    failure=("adapter_corrupt", "it is\nbroken"),
    pin=True,
    ttl=0.1,
    priority=-7,
    managed_by="folder",
    created_at=123.456,
)


def put_full(catalogue: Catalogue) -> AdapterRecord:
    catalogue.put_adapter(adapter("second", 2), version_record(2))
    catalogue.put_adapter(adapter("third", 3), version_record(3))
    return catalogue.put_adapter(FULL_ADAPTER, version_record(1))


def test_an_adapter_comes_back_as_it_was_put(catalogue: Catalogue, replica: Catalogue) -> None:
    before = time.time()
    written = put_full(catalogue)
    assert replace(written, revision=0, updated_at=0.0) == FULL_ADAPTER
    assert before <= written.updated_at <= time.time()
    for reader in (catalogue, replica):
        snapshot = reader.snapshot()
        assert snapshot.adapters["sql"] == written
        assert snapshot.versions == {version_of(n): version_record(n) for n in (1, 2, 3)}
        check_integrity(snapshot)


def test_it_survives_closing(catalogue: Catalogue, catalogue_url: str, open_catalogue: OpenCatalogue) -> None:
    put_full(catalogue)
    before = catalogue.snapshot()
    catalogue.close()
    assert open_catalogue(catalogue_url).snapshot() == before


def test_the_times_are_set_where_they_are_not_given(catalogue: Catalogue) -> None:
    first = catalogue.put_adapter(adapter("sql"))
    assert first.created_at == first.updated_at > 0
    second = catalogue.put_adapter(replace(first, pin=True))
    assert second.created_at == first.created_at
    assert second.updated_at >= first.updated_at


def test_an_alias_comes_back_as_it_was_put(catalogue: Catalogue, replica: Catalogue) -> None:
    catalogue.put_adapter(adapter("a", 1), version_record(1))
    catalogue.put_adapter(adapter("b", 2), version_record(2))
    targets = (AliasTarget(adapter="a", version=version_of(1), weight=0.9), AliasTarget(adapter="b", weight=0.1))
    previous = ((AliasTarget(adapter="a"),), (AliasTarget(adapter="b", version=version_of(2)),))
    written = catalogue.put_alias(alias("prod", *targets, previous=previous, managed_by="file"))
    assert written == alias("prod", *targets, previous=previous, managed_by="file", revision=3)
    assert replica.snapshot().aliases == {"prod": written}


@pytest.mark.parametrize("norm", [math.inf, 1e-320, 0.1 + 0.2, 3e38])
def test_a_report_keeps_every_float(catalogue: Catalogue, norm: float) -> None:
    record = version_record(1, delta_norms={"q_proj": norm}, base_model="org/base\x00")
    catalogue.put_adapter(adapter("sql", 1), record)
    assert catalogue.snapshot().versions[version_of(1)] == record


ANY_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
WEIGHTS = st.lists(st.floats(0, 1e308), max_size=3)
TARGETS = st.lists(st.builds(AliasTarget, adapter=ANY_NAMES, weight=st.floats(0, 1e308)), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    record=st.builds(
        AdapterRecord,
        name=ANY_NAMES,
        source=st.none() | st.text(),
        pending=st.none() | st.text(),
        failure=st.none() | st.tuples(st.text(), st.text()),
        pin=st.booleans(),
        ttl=st.none() | st.floats(0, allow_nan=False),
        priority=st.integers(),
        managed_by=st.text(),
        created_at=st.floats(0.5, 1e12),
    ),
    weights=WEIGHTS,
    previous=st.lists(TARGETS, max_size=2).map(tuple),
)
def test_any_value_comes_back(
    catalogue: Catalogue,
    record: AdapterRecord,
    weights: list[float],
    previous: tuple[tuple[AliasTarget, ...], ...],
) -> None:
    record = replace(record, version=version_of(1))
    written = catalogue.put_adapter(record, version_record(1))
    targets = tuple(AliasTarget(adapter=record.name, weight=weight) for weight in weights)
    named = catalogue.put_alias(AliasRecord(name=record.name + "~", targets=targets, previous=previous))
    snapshot = catalogue.snapshot()
    assert snapshot.adapters == {record.name: written}
    assert snapshot.aliases == {named.name: named}
    assert replace(written, revision=0, updated_at=0.0) == record
    if targets:
        with pytest.raises(CatalogueConflict, match="leads to"):
            catalogue.delete_adapter(written)
    catalogue.delete_alias(named)
    catalogue.delete_adapter(written)


# Compare and set.


def test_of_two_who_insert_one_wins(catalogue: Catalogue, replica: Catalogue) -> None:
    first = catalogue.put_adapter(adapter("sql", 1), version_record(1))
    with pytest.raises(CatalogueConflict, match="was changed by somebody else"):
        replica.put_adapter(adapter("sql", 2), version_record(2))
    assert replica.snapshot().adapters == {"sql": first}
    assert replica.snapshot().versions.keys() == {version_of(1)}


def test_of_two_who_replace_one_wins(catalogue: Catalogue, replica: Catalogue) -> None:
    read = catalogue.put_adapter(adapter("sql", 1), version_record(1))
    seen = replica.snapshot().adapters["sql"]
    won = replica.put_adapter(replace(seen, pin=True))
    for change in (catalogue.put_adapter, catalogue.delete_adapter):
        with pytest.raises(CatalogueConflict):
            change(read)
    assert catalogue.snapshot().adapters == {"sql": won}
    catalogue.put_adapter(replace(won, priority=3))


def test_of_two_who_move_an_alias_one_wins(catalogue: Catalogue, replica: Catalogue) -> None:
    for name in ("a", "b"):
        catalogue.put_adapter(adapter(name, 1), version_record(1))
    read = catalogue.put_alias(alias("prod", AliasTarget(adapter="a")))
    won = replica.put_alias(replace(read, targets=(AliasTarget(adapter="b"),)))
    for change in (catalogue.put_alias, catalogue.delete_alias):
        with pytest.raises(CatalogueConflict):
            change(read)
    assert catalogue.snapshot().aliases == {"prod": won}


def test_a_revision_is_not_used_again_after_a_deletion(catalogue: Catalogue, replica: Catalogue) -> None:
    """Else who read the first `sql` would overwrite the second, which he never saw."""
    read = catalogue.put_adapter(adapter("sql"))
    replica.delete_adapter(read)
    replica.put_adapter(adapter("sql", pin=True))
    for change in (catalogue.put_adapter, catalogue.delete_adapter):
        with pytest.raises(CatalogueConflict):
            change(read)


def test_what_is_gone_can_neither_be_replaced_nor_deleted(catalogue: Catalogue) -> None:
    read = catalogue.put_adapter(adapter("sql"))
    catalogue.delete_adapter(read)
    for record in (read, adapter("sql"), adapter("never")):
        with pytest.raises(CatalogueConflict):
            catalogue.delete_adapter(record)
    with pytest.raises(CatalogueConflict, match="is gone"):
        catalogue.put_adapter(read)
    with pytest.raises(CatalogueConflict, match="is gone"):
        catalogue.put_adapter(adapter("never", revision=5))
    assert catalogue.snapshot().adapters == {}


def test_a_refused_change_takes_no_number(catalogue: Catalogue) -> None:
    catalogue.put_adapter(adapter("sql"))
    with pytest.raises(CatalogueConflict) as refused:
        catalogue.put_adapter(adapter("sql"))
    assert (refused.value.status, refused.value.code) == (409, "adapter_conflict")
    assert catalogue.snapshot().sequence == 1


# One name space.


def test_an_alias_cannot_have_an_adapters_name_nor_the_other_way_round(catalogue: Catalogue) -> None:
    sql = catalogue.put_adapter(adapter("sql", 1), version_record(1))
    prod = catalogue.put_alias(alias("prod", AliasTarget(adapter="sql")))
    with pytest.raises(CatalogueConflict, match="an adapter's name"):
        catalogue.put_alias(alias("sql", AliasTarget(adapter="sql")))
    with pytest.raises(CatalogueConflict, match="an alias's name"):
        catalogue.put_adapter(adapter("prod"))
    with pytest.raises(CatalogueConflict):
        catalogue.delete_alias(alias("sql", revision=sql.revision))
    with pytest.raises(CatalogueConflict):
        catalogue.put_adapter(adapter("prod", revision=prod.revision))
    assert catalogue.snapshot().adapters == {"sql": sql}
    assert catalogue.snapshot().aliases == {"prod": prod}


def test_a_name_may_become_the_other_kind_once_it_is_gone(catalogue: Catalogue, replica: Catalogue) -> None:
    sql = catalogue.put_adapter(adapter("sql", 1), version_record(1))
    catalogue.put_adapter(adapter("other", 1), version_record(1))
    follower = Follower(replica.snapshot())
    catalogue.delete_adapter(sql)
    catalogue.put_alias(alias("sql", AliasTarget(adapter="other")))
    changes = replica.changes(follower.sequence)
    assert changes.adapters == {"sql": None}
    follower.apply(changes)
    follower.check_equals(catalogue.snapshot())


# Versions.


def test_versions_nobody_names_go_with_the_change_that_dropped_them(catalogue: Catalogue) -> None:
    def versions() -> set[str]:
        snapshot = catalogue.snapshot()
        check_integrity(snapshot)
        return {f"{int(version, 16)}" for version in snapshot.versions}

    sql = catalogue.put_adapter(adapter("sql", 1), version_record(1))
    same = catalogue.put_adapter(adapter("same", 1), version_record(1))
    sql = catalogue.put_adapter(replace(sql, version=version_of(2), previous=(version_of(1),)), version_record(2))
    catalogue.delete_adapter(same)
    assert versions() == {"1", "2"}  # one is still the previous one
    sql = catalogue.put_adapter(replace(sql, previous=()))
    assert versions() == {"2"}
    other = catalogue.put_adapter(adapter("other", 3), version_record(3))
    prod = catalogue.put_alias(alias("prod", AliasTarget(adapter="sql", version=version_of(2))))
    moved = replace(prod, targets=(AliasTarget(adapter="other"),), previous=(prod.targets,))
    prod = catalogue.put_alias(moved)
    catalogue.delete_adapter(sql)
    assert versions() == {"2", "3"}  # the alias led there
    prod = catalogue.put_alias(replace(prod, previous=()))
    assert versions() == {"3"}
    catalogue.delete_alias(prod)
    catalogue.delete_adapter(other)
    assert versions() == set()


def test_a_version_that_is_not_known_cannot_be_named(catalogue: Catalogue) -> None:
    with pytest.raises(CatalogueConflict, match="is not in the catalogue"):
        catalogue.put_adapter(adapter("sql", 1))
    with pytest.raises(CatalogueConflict, match="is not in the catalogue"):
        catalogue.put_alias(alias("prod", previous=((AliasTarget(adapter="sql", version=version_of(1)),),)))
    with pytest.raises(ValueError, match="not among those"):
        catalogue.put_adapter(adapter("sql"), version_record(1))
    assert catalogue.snapshot().sequence == 0


def test_a_known_version_stays_as_it_is(catalogue: Catalogue) -> None:
    catalogue.put_adapter(adapter("sql", 1), version_record(1))
    catalogue.put_adapter(adapter("same", 1), version_record(1, warnings=("from another folder",)))
    assert catalogue.snapshot().versions == {version_of(1): version_record(1)}


# Changes.


def test_changes_tell_what_is_different_and_nothing_else(catalogue: Catalogue, replica: Catalogue) -> None:
    kept = catalogue.put_adapter(adapter("kept", 1), version_record(1))
    gone = catalogue.put_adapter(adapter("gone", 2), version_record(2))
    start = replica.snapshot().sequence
    new = catalogue.put_adapter(adapter("new", 3, previous=(version_of(1),)), version_record(3))
    catalogue.delete_adapter(gone)
    prod = catalogue.put_alias(alias("prod", AliasTarget(adapter="kept", version=version_of(1))))
    changes = replica.changes(start)
    assert changes.sequence == start + 3
    assert changes.adapters == {"new": new, "gone": None, "prod": None}
    assert changes.aliases == {"new": None, "gone": None, "prod": prod}
    assert changes.versions == {version_of(n): version_record(n) for n in (1, 3)}
    nothing = replica.changes(changes.sequence)
    assert (nothing.sequence, nothing.adapters, nothing.aliases, nothing.versions) == (changes.sequence, {}, {}, {})
    assert replica.changes(0).adapters["kept"] == kept


def test_deletions_are_forgotten_in_time_and_who_missed_one_is_told(catalogue_url: str) -> None:
    catalogue = Catalogue(CatalogueDatabase.open(catalogue_url), kept_changes=3)
    catalogue.put_adapter(adapter("first"))
    old = catalogue.snapshot().sequence
    catalogue.delete_adapter(catalogue.put_adapter(adapter("gone")))
    assert catalogue.changes(old).adapters == {"gone": None}
    for number in range(5):
        catalogue.delete_adapter(catalogue.put_adapter(adapter(f"later{number}")))
    assert catalogue.snapshot().adapters.keys() == {"first"}
    with pytest.raises(CatalogueHistoryGone):
        catalogue.changes(old)
    latest = catalogue.snapshot().sequence
    assert catalogue.changes(latest - 3).adapters == {"later3": None, "later4": None}
    assert catalogue.changes(latest).adapters == {}
    catalogue.close()


def test_changes_after_a_number_that_never_was_are_refused(catalogue: Catalogue) -> None:
    """The number is from before a backup was brought back, so what changed since cannot be told."""
    with pytest.raises(CatalogueHistoryGone):
        catalogue.changes(7)


# Opening.


def test_a_newer_schema_is_refused(catalogue: Catalogue, catalogue_url: str) -> None:
    """By who opens it, and by who has had it open since before: the newer release may mean other things by a record."""
    catalogue.put_adapter(adapter("sql"))
    engine = create_engine(catalogue_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE catalogue_state SET schema_version = 2"))
    engine.dispose()
    with pytest.raises(CatalogueRefused, match="its schema is 2, this one knows 1"):
        Catalogue.open(catalogue_url)
    with pytest.raises(CatalogueRefused, match="its schema is 2"):
        catalogue.put_adapter(adapter("other"))
    assert catalogue.snapshot().adapters.keys() == {"sql"}


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("sqlite://", "absolute path"),
        ("sqlite:///:memory:", "absolute path"),
        ("sqlite:///relative.db", "absolute path"),
        ("sqlite:////tmp/x.db?mode=memory", "absolute path"),
        ("mysql://user:hunter2@host/db", "mysql cannot hold"),
        ("", "cannot be read"),
        ("/var/lib/loramux", "cannot be read"),
        ("postgresql://user:hunter2@host:port/db", "cannot be read"),
    ],
)
def test_a_url_that_is_no_catalogue_is_refused(url: str, why: str) -> None:
    with pytest.raises(CatalogueRefused, match=why) as refused:
        Catalogue.open(url)
    assert "hunter2" not in str(refused.value)


def test_only_its_owner_may_read_the_file(sqlite_url: str, open_catalogue: OpenCatalogue, tmp_path: Path) -> None:
    open_catalogue(sqlite_url).put_adapter(replace(adapter("sql"), source="https://host/?token=secret"))
    files = list(tmp_path.iterdir())
    assert len(files) == 3  # the log and its index too
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_the_file_is_written_ahead_and_synced(sqlite_url: str, open_catalogue: OpenCatalogue) -> None:
    catalogue = open_catalogue(sqlite_url)
    with catalogue._database.read() as connection:
        modes = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
    assert modes == ["wal", 2]


# Cost: bounds are far above what is measured, for machines that are busy.


def test_thousands_of_adapters_are_read_at_once(catalogue: Catalogue) -> None:
    records = [adapter(f"adapter {n}", n, created_at=1.0, updated_at=1.0, revision=n + 2) for n in range(5_000)]
    with catalogue._database.write() as (connection, _sequence):
        _insert_all(connection, records)
    started = time.perf_counter()
    snapshot = catalogue.snapshot()
    seconds = time.perf_counter() - started
    assert snapshot.adapters == {record.name: record for record in records}
    assert snapshot.versions == {version_of(n): version_record(n) for n in range(5_000)}
    assert seconds < 5
    started = time.perf_counter()
    for _ in range(200):
        assert catalogue.changes(snapshot.sequence).adapters == {}
    assert (time.perf_counter() - started) / 200 < 0.02


def _insert_all(connection: Connection, records: Sequence[AdapterRecord]) -> None:
    """As thousands of puts would leave it, in one transaction."""
    names = [
        {"name": record.name, "kind": ADAPTER, "sequence": record.revision, "record": record_text(record)}
        for record in records
    ]
    connection.execute(insert(NAMES), names)
    connection.execute(insert(VERSIONS), [version_values(version_record(n)) for n in range(len(records))])
    connection.execute(insert(VERSION_USES), [{"name": r.name, "version": r.version} for r in records])
    connection.execute(update(STATE).values(sequence=len(records) + 1))
