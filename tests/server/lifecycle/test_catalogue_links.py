"""What aliases lead to, on both databases: it stays, and is there, whichever of two servers is first."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import event

from server.lifecycle.catalogue import Catalogue
from server.lifecycle.catalogue_errors import CatalogueConflict
from server.lifecycle.catalogue_records import AdapterRecord, AliasRecord, AliasTarget
from tests.server.lifecycle.catalogue_world import adapter, version_of, version_record


def alias_to(name: str, number: int | None = None, **fields: object) -> AliasRecord:
    version = None if number is None else version_of(number)
    targets = (AliasTarget(adapter=name, version=version),)
    return AliasRecord(name="prod", targets=targets, **fields)  # type: ignore[arg-type]


@pytest.fixture
def sql(catalogue: Catalogue) -> AdapterRecord:
    """Stands for version 2, and keeps version 1."""
    first = catalogue.put_adapter(adapter("sql", 1), version_record(1))
    return catalogue.put_adapter(replace(first, version=version_of(2), previous=(version_of(1),)), version_record(2))


def check_refused(catalogue: Catalogue, change: Callable[[], object], why: str) -> None:
    before = catalogue.snapshot()
    with pytest.raises(CatalogueConflict, match=why):
        change()
    assert catalogue.snapshot() == before


@pytest.mark.parametrize("number", [None, 1, 2])
def test_a_name_that_an_alias_leads_to_is_not_removed(
    catalogue: Catalogue, replica: Catalogue, sql: AdapterRecord, number: int | None
) -> None:
    prod = replica.put_alias(alias_to("sql", number))
    check_refused(catalogue, lambda: catalogue.delete_adapter(sql), "'prod' leads to 'sql'")
    replica.delete_alias(prod)
    catalogue.delete_adapter(sql)


@pytest.mark.parametrize("name", ['a"b', "100%", "a_c", "back\\slash", "ünï", "SQL", "a/b"])
def test_whatever_the_name_is(catalogue: Catalogue, name: str) -> None:
    """And an alias to one like it is in nobody's way."""
    for each in {name, name.swapcase(), f"{name}~", name[:-1]}:
        catalogue.put_adapter(adapter(each, 1), version_record(1))
    catalogue.put_alias(alias_to(name))
    for other, record in catalogue.snapshot().adapters.items():
        if other == name:
            check_refused(catalogue, lambda read=record: catalogue.delete_adapter(read), "leads to")
        else:
            catalogue.delete_adapter(record)


@pytest.mark.parametrize("number", [1, 2])
def test_a_version_that_an_alias_names_is_not_given_up(
    catalogue: Catalogue, replica: Catalogue, sql: AdapterRecord, number: int
) -> None:
    """Nor one that the alias led to before: it can be rolled back."""
    new = replace(sql, version=version_of(3), previous=())
    prod = replica.put_alias(alias_to("sql", number))
    check_refused(catalogue, lambda: catalogue.put_adapter(new, version_record(3)), "'prod' names a version of 'sql'")
    prod = replica.put_alias(replace(alias_to("sql"), previous=(prod.targets,), revision=prod.revision))
    check_refused(catalogue, lambda: catalogue.put_adapter(new, version_record(3)), "'prod' names a version of 'sql'")
    kept = catalogue.put_adapter(replace(new, previous=(version_of(number),)), version_record(3))
    replica.put_alias(replace(prod, previous=()))
    catalogue.put_adapter(replace(kept, previous=()))
    assert catalogue.snapshot().versions.keys() == {version_of(3)}


def test_a_version_is_given_up_that_an_alias_names_by_another_name(catalogue: Catalogue, sql: AdapterRecord) -> None:
    catalogue.put_adapter(adapter("same", 1), version_record(1))
    catalogue.put_alias(alias_to("same", 1))
    catalogue.put_adapter(replace(sql, previous=()))
    assert version_of(1) in catalogue.snapshot().versions


def test_what_an_alias_led_to_before_is_removed(catalogue: Catalogue, sql: AdapterRecord) -> None:
    """And the name may be given anew, with fewer versions, and change as any other."""
    chat = catalogue.put_adapter(adapter("chat", 3), version_record(3))
    catalogue.put_alias(alias_to("chat", previous=(alias_to("sql", 1).targets, alias_to("sql").targets)))
    catalogue.delete_adapter(sql)
    again = catalogue.put_adapter(adapter("sql", 2), version_record(2))
    catalogue.put_adapter(replace(again, version=version_of(4)), version_record(4))
    check_refused(catalogue, lambda: catalogue.delete_adapter(chat), "'prod' leads to 'chat'")


@pytest.mark.parametrize("number", [None, 1, 2])
def test_no_alias_leads_to_what_is_gone(
    catalogue: Catalogue, replica: Catalogue, sql: AdapterRecord, number: int | None
) -> None:
    chat = catalogue.put_adapter(adapter("chat", 1), version_record(1))
    catalogue.put_adapter(adapter("twin", 2), version_record(2))
    prod = catalogue.put_alias(alias_to("chat"))
    replica.delete_adapter(sql)
    moved = replace(alias_to("sql", number), revision=prod.revision)
    check_refused(catalogue, lambda: catalogue.put_alias(moved), "'sql' is no adapter that was loaded")
    check_refused(catalogue, lambda: catalogue.delete_adapter(chat), "leads to")


def test_no_alias_leads_to_a_version_that_the_name_gave_up(catalogue: Catalogue, sql: AdapterRecord) -> None:
    catalogue.put_adapter(adapter("chat", 1), version_record(1))
    catalogue.put_adapter(replace(sql, previous=()))
    check_refused(catalogue, lambda: catalogue.put_alias(alias_to("sql", 1)), "neither is nor keeps version 0")
    catalogue.put_alias(alias_to("sql", 2))


def test_no_alias_leads_to_what_was_never_loaded_or_is_an_alias(catalogue: Catalogue, sql: AdapterRecord) -> None:
    """A load that was only announced may fail, and its name goes then."""
    catalogue.put_adapter(adapter("announced", pending="{}"))
    catalogue.put_alias(replace(alias_to("sql", 2), name="other"))
    for name in ("announced", "never", "other"):
        check_refused(catalogue, lambda to=name: catalogue.put_alias(alias_to(to)), "is no adapter that was loaded")


def test_one_target_of_many_that_is_gone(catalogue: Catalogue, sql: AdapterRecord) -> None:
    targets = tuple(AliasTarget(adapter=name) for name in ("sql", "gone"))
    check_refused(catalogue, lambda: catalogue.put_alias(AliasRecord(name="prod", targets=targets)), "'gone' is no")


def test_a_change_looks_at_aliases_and_at_no_other_names(sqlite_url: str) -> None:
    """So that it costs as much with thousands of adapters: in SQLite's plans every look at names is by an index."""
    catalogue = Catalogue.open(sqlite_url)
    statements: list[tuple[str, tuple[object, ...]]] = []
    engine = catalogue._database._backend.writer
    event.listen(engine, "before_cursor_execute", lambda c, cursor, sql, values, *_: statements.append((sql, values)))
    sql = catalogue.put_adapter(adapter("sql", 1), version_record(1))
    prod = catalogue.put_alias(alias_to("sql"))
    sql = catalogue.put_adapter(replace(sql, version=version_of(2)), version_record(2))
    catalogue.delete_alias(prod)
    catalogue.delete_adapter(sql)
    looks = [look for look in statements if look[0].startswith("SELECT")]
    with catalogue._database.read() as connection:
        plans = [
            row[3] for sql, values in looks for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values)
        ]
    catalogue.close()
    scans = {plan for plan in plans if plan.startswith("SCAN")}
    assert scans == {"SCAN catalogue_names USING INDEX catalogue_names_alias"}
