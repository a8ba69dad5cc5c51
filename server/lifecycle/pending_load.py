"""A load that was acknowledged and not finished, as the catalogue keeps it: one line of text."""

import json
from dataclasses import asdict, replace

from server.lifecycle.catalogue_records import AdapterRecord
from server.lifecycle.control import WantedAdapter

_BY = "by"


def pending_text(wanted: WantedAdapter, server_id: str) -> str:
    """`server_id` is of the server that took the load on: what it read may be out of another's reach."""
    return json.dumps({**asdict(wanted), _BY: server_id}, sort_keys=True)


def parse_pending(text: str) -> WantedAdapter:
    return WantedAdapter(**{key: value for key, value in json.loads(text).items() if key != _BY})


def accepted_by(text: str) -> str:
    """The `server_id` of `pending_text`."""
    server_id: str = json.loads(text)[_BY]
    return server_id


def announced(record: AdapterRecord | None, wanted: WantedAdapter, pending: str | None) -> AdapterRecord:
    """The record that says what is being loaded; of a new name, already with its settings."""
    if record is None:
        record = AdapterRecord(
            name=wanted.name,
            pin=wanted.pin,
            ttl=wanted.ttl,
            priority=wanted.priority,
            managed_by=wanted.managed_by,
        )
    return replace(record, pending=pending, failure=None)
