"""Small records for the tests of the catalogue, and what must be true of any snapshot."""

from adapters.adapter_ref import AdapterVersion
from adapters.load_report import LoadReport
from server.lifecycle.catalogue_records import (
    AdapterRecord,
    AliasRecord,
    Changes,
    Snapshot,
    VersionRecord,
)


def version_of(number: int) -> AdapterVersion:
    return AdapterVersion(f"{number:064x}")


def version_record(number: int, **report: object) -> VersionRecord:
    values: dict[str, object] = {
        "modules": {"q_proj": 30, "v_proj": 30},
        "num_params": 1_000_000 + number,
        "num_bytes": 2_000_000 + number,
        "lora_rank": 8,
        "features": ("rslora",),
        "delta_norms": {"q_proj": 0.1 + number, "v_proj": 1e-17},
        "warnings": ("B is zero in a module",),
        "base_model": None,
        "stored_dtypes": ("BF16", "F32"),
    }
    return VersionRecord(
        version=version_of(number),
        lora_rank=8,
        num_bytes=2_000_000 + number,
        modules=("q_proj", "v_proj"),
        report=LoadReport(**{**values, **report}),  # type: ignore[arg-type]
    )


def adapter(name: str, number: int | None = None, **fields: object) -> AdapterRecord:
    version = None if number is None else version_of(number)
    return AdapterRecord(name=name, source=f"/adapters/{name}", version=version, **fields)  # type: ignore[arg-type]


def check_integrity(snapshot: Snapshot) -> None:
    """Every version that is named is there, no other is; every revision is of a change that happened, and its own."""
    records = [*snapshot.adapters.values(), *snapshot.aliases.values()]
    assert snapshot.versions.keys() == {version for record in records for version in record.named_versions}
    assert all(version == record.version for version, record in snapshot.versions.items())
    assert not snapshot.adapters.keys() & snapshot.aliases.keys()
    revisions = [record.revision for record in records]
    assert len(set(revisions)) == len(revisions)
    assert all(0 < revision <= snapshot.sequence for revision in revisions)


class Follower:
    """What a replica holds: a snapshot once, then changes."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.sequence = snapshot.sequence
        self.adapters: dict[str, AdapterRecord] = dict(snapshot.adapters)
        self.aliases: dict[str, AliasRecord] = dict(snapshot.aliases)
        self.versions = dict(snapshot.versions)

    def apply(self, changes: Changes) -> None:
        assert changes.sequence >= self.sequence
        self.sequence = changes.sequence
        for name, adapter_record in changes.adapters.items():
            self.adapters.pop(name, None)
            if adapter_record is not None:
                self.adapters[name] = adapter_record
        for name, alias_record in changes.aliases.items():
            self.aliases.pop(name, None)
            if alias_record is not None:
                self.aliases[name] = alias_record
        self.versions.update(changes.versions)

    def check_equals(self, snapshot: Snapshot) -> None:
        assert self.sequence == snapshot.sequence
        assert self.adapters == snapshot.adapters
        assert self.aliases == snapshot.aliases
        assert {version: self.versions[version] for version in snapshot.versions} == snapshot.versions
