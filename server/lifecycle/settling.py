"""Which changes have come to rest: a folder that is still being copied is not read, one that blinks is not removed.

Pure bookkeeping over names and fingerprints, told the time. Knows nothing of files.
"""

import math
from collections.abc import Collection, Mapping

from server.lifecycle.folder_scan import FoundAdapter

INCOMPLETE_SECONDS = 5.0  # a config without weights is given this long before the lack is told


class Settling:
    """`settled` is name → fingerprint, of what was at rest last; `quiet` how long something must stay as it is."""

    def __init__(self, settled: Mapping[str, str], *, quiet: float) -> None:
        self.settled = dict(settled)
        self.next_look = math.inf  # when to look at `unsettled` again, of the clock that `update` is told
        self._quiet = quiet
        self._seen: dict[str, tuple[str | None, float]] = {}  # (fingerprint, None = gone; first seen when)

    @property
    def unsettled(self) -> frozenset[str]:
        return frozenset(self._seen)

    def update(
        self, found: Mapping[str, FoundAdapter], now: float, epoch: float, *, hidden: Collection[str] = ()
    ) -> None:
        """`found` is everything that is there at `now` (any clock), which is `epoch` seconds since 1970.

        What is `hidden` could not be looked at and counts as it was.
        """
        self.next_look = math.inf
        for name in [*found, *(name for name in self.settled if name not in found and name not in hidden)]:
            self._update(name, found.get(name), now, epoch)
        for name in [name for name in self._seen if name not in found and name not in self.settled]:
            del self._seen[name]

    def _update(self, name: str, found: FoundAdapter | None, now: float, epoch: float) -> None:
        fingerprint = None if found is None else found.fingerprint
        if fingerprint == self.settled.get(name):
            self._seen.pop(name, None)
            return
        seen = self._seen.get(name)
        if seen is None or seen[0] != fingerprint:
            seen = self._seen[name] = (fingerprint, now)
        rest_at = seen[1] + self._patience(found, epoch)
        if now < rest_at:
            self.next_look = min(self.next_look, rest_at)
            return
        del self._seen[name]
        if fingerprint is None:
            del self.settled[name]
        else:
            self.settled[name] = fingerprint

    def _patience(self, found: FoundAdapter | None, epoch: float) -> float:
        """Seconds from when it was first seen so. None for files at rest already: they were moved here whole."""
        if found is not None and not found.has_weights:
            return INCOMPLETE_SECONDS
        is_old = found is not None and found.changed_at <= epoch - self._quiet
        return 0.0 if is_old else self._quiet
