"""Two servers on one catalogue under any order of changes, held to a plain dict; a third only polls and keeps up."""

from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from server.lifecycle.catalogue import Catalogue
from server.lifecycle.catalogue_errors import CatalogueConflict
from server.lifecycle.catalogue_records import AdapterRecord, AliasRecord, AliasTarget
from tests.server.lifecycle.catalogue_world import Follower, adapter, check_integrity, version_of, version_record
from tests.server.lifecycle.postgres_server import PostgresServer

SERVERS = st.integers(0, 1)
NAMES = st.sampled_from(["a", "b", "c"])
VERSIONS = st.integers(0, 3)
STALENESS = st.integers(0, 3)  # how many of a name's records ago the writer read it; 0 = it is up to date

Record = AdapterRecord | AliasRecord


class CatalogueMachine(RuleBasedStateMachine):
    """`known` says what stands, `past` what ever stood under a name, oldest first."""

    def new_url(self) -> str:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.url = self.new_url()
        self.servers = [Catalogue.open(self.url) for _ in range(2)]
        self.follower = Follower(self.servers[0].snapshot())
        self.known: dict[str, Record] = {}
        self.past: dict[str, list[Record]] = {}

    @rule(server=SERVERS, name=NAMES, number=VERSIONS, previous=st.lists(VERSIONS, max_size=2), pin=st.booleans())
    def insert_adapter(self, server: int, name: str, number: int, previous: list[int], pin: bool) -> None:
        versions = tuple(version_of(n) for n in previous)
        self._put(server, adapter(name, number, previous=versions, pin=pin), number)

    @rule(server=SERVERS, name=NAMES, stale=STALENESS, number=st.none() | VERSIONS)
    def replace_adapter(self, server: int, name: str, stale: int, number: int | None) -> None:
        read = self._read(name, stale)
        if isinstance(read, AdapterRecord):
            version = None if number is None else version_of(number)
            previous = () if read.version is None else (read.version,)
            self._put(server, replace(read, version=version, previous=previous), number)

    @rule(server=SERVERS, name=NAMES, number=st.none() | VERSIONS, leads_to=NAMES)
    def insert_alias(self, server: int, name: str, number: int | None, leads_to: str) -> None:
        self._put(server, AliasRecord(name=name, targets=(_target(leads_to, number),)), None)

    @rule(server=SERVERS, name=NAMES, stale=STALENESS, number=st.none() | VERSIONS, leads_to=NAMES)
    def move_alias(self, server: int, name: str, stale: int, number: int | None, leads_to: str) -> None:
        read = self._read(name, stale)
        if isinstance(read, AliasRecord):
            moved = replace(read, targets=(_target(leads_to, number),), previous=(read.targets,))
            self._put(server, moved, None)

    @rule(server=SERVERS, name=NAMES, stale=STALENESS)
    def delete(self, server: int, name: str, stale: int) -> None:
        read = self._read(name, stale)
        if read is None:
            return
        may = self.known.get(name) == read and not (isinstance(read, AdapterRecord) and self._is_led_to(name))
        catalogue = self.servers[server]
        try:
            if isinstance(read, AdapterRecord):
                catalogue.delete_adapter(read)
            else:
                catalogue.delete_alias(read)
        except CatalogueConflict:
            assert not may
        else:
            assert may
            del self.known[name]

    @rule(server=SERVERS)
    def restart(self, server: int) -> None:
        self.servers[server].close()
        self.servers[server] = Catalogue.open(self.url)

    @rule(server=SERVERS)
    def poll(self, server: int) -> None:
        self.follower.apply(self.servers[server].changes(self.follower.sequence))
        self.follower.check_equals(self.servers[server].snapshot())

    @invariant()
    def is_what_was_put(self) -> None:
        for catalogue in self.servers:
            snapshot = catalogue.snapshot()
            check_integrity(snapshot)
            assert {**snapshot.adapters, **snapshot.aliases} == self.known
            for version, record in snapshot.versions.items():
                assert record == version_record(int(version, 16))

    def teardown(self) -> None:
        for catalogue in getattr(self, "servers", ()):
            catalogue.close()

    def _read(self, name: str, stale: int) -> Record | None:
        """What a writer has who read it `stale` records ago; None when there were not that many."""
        records = self.past.get(name, [])
        return records[-1 - stale] if stale < len(records) else None

    def _put(self, server: int, record: Record, number: int | None) -> None:
        stands = self.known.get(record.name)
        revision = 0 if stands is None else stands.revision
        same_kind = stands is None or type(stands) is type(record)
        known = {version for other in self.known.values() for version in other.named_versions}
        known |= set() if number is None else {version_of(number)}
        may = record.revision == revision and same_kind and record.named_versions <= known and self._links_hold(record)
        try:
            written = self._call(server, record, number)
        except CatalogueConflict:
            assert not may
            return
        assert may
        self.known[record.name] = written
        self.past.setdefault(record.name, []).append(written)

    def _links_hold(self, record: Record) -> bool:
        """Whether aliases lead to what is there once `record` is put, and their versions are kept."""
        if isinstance(record, AliasRecord):
            return all(self._is_there(target) for target in record.targets)
        stands = self.known.get(record.name)
        taken = (stands.named_versions if stands else frozenset()) - record.named_versions
        targets = (target for alias in self._aliases() for targets in alias.previous for target in targets)
        named = (*targets, *(target for alias in self._aliases() for target in alias.targets))
        return not any(target.adapter == record.name and target.version in taken for target in named)

    def _is_there(self, target: AliasTarget) -> bool:
        stands = self.known.get(target.adapter)
        if not isinstance(stands, AdapterRecord):
            return False
        return target.version in stands.named_versions if target.version else bool(stands.named_versions)

    def _is_led_to(self, name: str) -> bool:
        return any(target.adapter == name for alias in self._aliases() for target in alias.targets)

    def _aliases(self) -> list[AliasRecord]:
        return [record for record in self.known.values() if isinstance(record, AliasRecord)]

    def _call(self, server: int, record: Record, number: int | None) -> Record:
        catalogue = self.servers[server]
        if isinstance(record, AliasRecord):
            written_alias = catalogue.put_alias(record)
            assert replace(written_alias, revision=record.revision) == record
            return written_alias
        version = None if number is None else version_record(number)
        written = catalogue.put_adapter(record, version)
        stamped = {"created_at": record.created_at or written.created_at, "updated_at": written.updated_at}
        assert replace(record, revision=written.revision, **stamped) == written  # type: ignore[arg-type]
        return written


def _target(adapter_name: str, number: int | None) -> AliasTarget:
    return AliasTarget(adapter=adapter_name, version=None if number is None else version_of(number), weight=0.5)


def test_on_sqlite(tmp_path: Path) -> None:
    class OnSQLite(CatalogueMachine):
        def new_url(self) -> str:
            return f"sqlite:///{tmp_path}/{uuid4().hex}.db"

    run_state_machine_as_test(OnSQLite, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))


def test_on_postgres(postgres: PostgresServer) -> None:
    class OnPostgres(CatalogueMachine):
        def new_url(self) -> str:
            return postgres.new_url()

    run_state_machine_as_test(OnPostgres, settings=settings(max_examples=8, stateful_step_count=25, deadline=None))
