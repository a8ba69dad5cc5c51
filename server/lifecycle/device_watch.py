"""Which versions are in the device's pools, as the engine's last step left them, and what they take there."""

from collections.abc import Callable

from adapters.adapter_ref import AdapterVersion
from server.engine.request import EngineStats
from server.lifecycle.directory import AdapterDirectory


class DeviceWatch:
    """`row_bytes` is what one rank takes; `on_change` is told of a version that came to the device or left it."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        directory: AdapterDirectory,
        *,
        row_bytes: int,
        on_change: Callable[[AdapterVersion], None],
    ) -> None:
        self._stats = stats
        self._directory = directory
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
        """0 for a version that is not there, or that nothing is known of any more."""
        known = self._directory.find_version(version)
        if known is None or version not in self._stats().active_versions:
            return 0
        return known.lora_rank * self._row_bytes
