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
        self._draining: dict[AdapterVersion, str] = {}  # → the name it was told with

    def first(self, adapter: AdapterDescription) -> dict[str, Any]:
        """One of all those that there are when the reader comes."""
        described = adapter.to_dict()
        if adapter.state is AdapterState.DRAINING and adapter.info is not None:
            self._draining[adapter.info.ref.version] = adapter.name
        else:
            self._named[adapter.name] = described["version"]
        return described

    def changed(self, name: str) -> Iterator[dict[str, Any]]:
        """Nothing of an alias, or of a name that came and went unseen. What ended comes first, so that a name that has
        its version again is not told to be gone.
        """
        draining = {info.ref.version: each for each in self._view.draining() if (info := each.info) is not None}
        for version in [version for version in self._draining if version not in draining]:
            yield unloaded(self._draining.pop(version), version)
        try:
            described = self._view.describe(name).to_dict()
            self._named[name] = described["version"]
            yield described
        except AdapterNotFound:
            if name in self._named and self._named.pop(name) not in draining:
                yield unloaded(name)
        for version, each in draining.items():
            if each.name == name and version not in self._draining:
                self._draining[version] = name
                yield each.to_dict()
