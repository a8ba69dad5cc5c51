"""Records to the values of a row and back. Reading what was written gives an equal record."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from adapters.adapter_ref import AdapterVersion
from adapters.load_report import LoadReport
from server.lifecycle.catalogue_records import AdapterRecord, AliasRecord, AliasTarget, VersionRecord

_IN_COLUMNS = ("name", "revision")  # not repeated in a record's JSON


def record_text(record: AdapterRecord | AliasRecord) -> str:
    values = asdict(record)
    for column in _IN_COLUMNS:
        del values[column]
    return json.dumps(values, separators=(",", ":"))


def adapter_of(name: str, revision: int, text: str) -> AdapterRecord:
    values = json.loads(text)
    values["previous"] = tuple(values["previous"])
    if values["failure"] is not None:
        values["failure"] = tuple(values["failure"])
    return AdapterRecord(name=name, revision=revision, **values)


def alias_of(name: str, revision: int, text: str) -> AliasRecord:
    values = json.loads(text)
    values["targets"] = _targets(values["targets"])
    values["previous"] = tuple(_targets(targets) for targets in values["previous"])
    return AliasRecord(name=name, revision=revision, **values)


def _targets(targets: list[dict[str, Any]]) -> tuple[AliasTarget, ...]:
    return tuple(AliasTarget(**target) for target in targets)


def version_values(record: VersionRecord) -> dict[str, str | int]:
    report = {field.name: getattr(record.report, field.name) for field in fields(LoadReport)}
    return {
        "version": record.version,
        "lora_rank": record.lora_rank,
        "num_bytes": record.num_bytes,
        "modules": json.dumps(record.modules),
        "report": json.dumps(report, separators=(",", ":"), default=dict),  # any kind of mapping
        "source": record.source,
    }


class VersionReader:
    """Reads rows of versions. Thousands of adapters have the same few lists of modules: each list is made once."""

    def __init__(self) -> None:
        self._modules: dict[str, tuple[str, ...]] = {}

    def __call__(self, row: tuple[str, int, int, str, str, str]) -> VersionRecord:
        version, lora_rank, num_bytes, modules, report, source = row
        return VersionRecord(
            version=AdapterVersion(version),
            lora_rank=lora_rank,
            num_bytes=num_bytes,
            modules=self._modules_of(modules),
            report=_report_of(json.loads(report)),
            source=source,
        )

    def _modules_of(self, text: str) -> tuple[str, ...]:
        known = self._modules.get(text)
        if known is None:
            known = self._modules[text] = tuple(json.loads(text))
        return known


def _report_of(values: Mapping[str, Any]) -> LoadReport:
    """A field that an earlier server did not write has its default; one that a later server wrote is left out."""
    known = {field.name for field in fields(LoadReport)}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in known:
            found[name] = tuple(value) if isinstance(value, list) else value
    if "gain_ranges" in found:
        found["gain_ranges"] = {kind: tuple(ends) for kind, ends in found["gain_ranges"].items()}
    if "ignored" in found:
        found["ignored"] = dict(found["ignored"])  # once a list, always empty
    return LoadReport(**found)
