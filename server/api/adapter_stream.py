"""What a reader of the stream of adapters is told: each adapter first, then what differs from what it was told before.

A version that drains is told of beside its name, and again when its last request has ended. Knows no HTTP.
"""

from collections.abc import Iterator
from typing import Any

from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterNotFound
from server.lifecycle.adapter_description import AdapterDescription, AdapterState, unloaded
from server.lifecycle.adapter_view import AdapterView


class AdapterStream:
    """One reader's view of the names and of the versions that drain."""

    def __init__(self, view: AdapterView) -> None:
        self._view = view
        self._named: dict[str, str | None] = {}  # name → its version, as it was told last
        self._draining: dict[str, frozenset[AdapterVersion]] = {}

    def first(self, adapter: AdapterDescription) -> dict[str, Any]:
        """One of all those that there are when the reader comes."""
        described = adapter.to_dict()
        if adapter.state is AdapterState.DRAINING and adapter.info is not None:
            version = adapter.info.ref.version
            self._draining[adapter.name] = self._draining.get(adapter.name, frozenset()) | {version}
        else:
            self._named[adapter.name] = described["version"]
        return described

    def changed(self, name: str) -> Iterator[dict[str, Any]]:
        """Nothing of an alias, or of a name that came and went unseen."""
        draining = {info.ref.version: each for each in self._view.draining(name) if (info := each.info) is not None}
        try:
            described = self._view.describe(name).to_dict()
            self._named[name] = described["version"]
            yield described
        except AdapterNotFound:
            if name in self._named and self._named.pop(name) not in draining:
                yield unloaded(name)
        told = self._draining.pop(name, frozenset())
        for version, each in draining.items():
            if version not in told:
                yield each.to_dict()
        for version in sorted(told - draining.keys()):
            yield unloaded(name, version)
        if draining:
            self._draining[name] = frozenset(draining)
