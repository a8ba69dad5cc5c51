"""A load that was acknowledged and not finished, as the catalogue keeps it: one line of text."""

import json
from dataclasses import asdict, replace

from server.lifecycle.catalogue_records import AdapterRecord
from server.lifecycle.control import WantedAdapter


def pending_text(wanted: WantedAdapter) -> str:
    return json.dumps(asdict(wanted), sort_keys=True)


def parse_pending(text: str) -> WantedAdapter:
    return WantedAdapter(**json.loads(text))


def announced(record: AdapterRecord | None, wanted: WantedAdapter) -> AdapterRecord:
    """The record that says what is being loaded; of a new name, already with its settings."""
    if record is None:
        record = AdapterRecord(
            name=wanted.name,
            pin=wanted.pin,
            ttl=wanted.ttl,
            priority=wanted.priority,
            managed_by=wanted.managed_by,
        )
    return replace(record, pending=pending_text(wanted), failure=None)
