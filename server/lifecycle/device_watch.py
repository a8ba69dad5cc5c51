"""Which versions are on the device, as the engine's last step left them, and what they take there."""

from collections.abc import Callable, Mapping
from typing import Protocol

from adapters.adapter_facts import AdapterFacts
from adapters.adapter_ref import AdapterVersion
from server.engine.request import EngineStats


class WatchedEngine(Protocol):
    @property
    def stats(self) -> EngineStats: ...
    @property
    def facts(self) -> Mapping[AdapterVersion, AdapterFacts]:
        """Of every version in host memory."""


class DeviceWatch:
    """`row_bytes` is what one rank takes; `on_change` is told of a version that came to the device or left it."""

    def __init__(
        self,
        engine: WatchedEngine,
        *,
        row_bytes: int,
        on_change: Callable[[AdapterVersion], None],
    ) -> None:
        self._engine = engine
        self._row_bytes = row_bytes
        self._on_change = on_change
        self._active: tuple[str, ...] = ()

    def observe_step(self, stats: EngineStats) -> None:
        if stats.active_versions != self._active:
            changed = set(stats.active_versions) ^ set(self._active)
            self._active = stats.active_versions
            for version in changed:
                self._on_change(AdapterVersion(version))

    def num_bytes(self, version: AdapterVersion) -> int:
        """In the pools and beside them; 0 for a version that is not there, or is on its way out."""
        facts = self._engine.facts.get(version)
        if facts is None or version not in self._engine.stats.active_versions:
            return 0
        return facts.need.num_rows * self._row_bytes + facts.need.num_extra_bytes
