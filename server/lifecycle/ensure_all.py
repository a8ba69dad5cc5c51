"""Several adapter versions in host memory at one moment, for a request that is computed with all of them.

They are read one after the other. While the caller is queued for one, its leases on the others hold nothing: who waits
for room never stands in the way of somebody else who does, so there is no deadlock; what was evicted meanwhile is read
once more. That comes to an end because the caller's place in the queue is that of its first wait, whichever version it
waits for: once it has waited long nobody younger overtakes it, and nothing it needs leaves to make room for the rest.
Knows neither names nor leases.
"""

import asyncio
from collections.abc import Mapping

from adapters.adapter_ref import AdapterVersion
from server.lifecycle.errors import AdapterNotReady, HostTierFull
from server.lifecycle.host_tier import HostTier

Sizes = Mapping[AdapterVersion, int]


class EnsureAll:
    def __init__(self, tier: HostTier) -> None:
        self._tier = tier

    async def ensure(self, sizes: Sizes, timeout: float) -> None:
        """All versions are in host memory when this returns, at once when they are there, and stay while the caller's
        leases, one on each, are open. Raises AdapterCapacity when they never fit together, HostTierFull or
        AdapterNotReady after `timeout` seconds in all, QueueFull, and whatever reading one of them raised.
        """
        asked: set[AdapterVersion] = set()
        if self._missing(sizes) is not None:
            self._tier.check_together(sizes)
            try:
                await self._collect(sizes, asked, timeout)
            except AdapterNotReady as error:
                raise _too_late(error, len(sizes), timeout) from error
        # Nothing is awaited between the last look and the return, and from here on the leases hold.
        for version in sizes:
            if version not in asked:
                self._tier.hit(version)

    async def _collect(self, sizes: Sizes, asked: set[AdapterVersion], timeout: float) -> None:
        since = _now()
        while (version := self._missing(sizes)) is not None:
            asked.add(version)
            beside, left = frozenset(sizes) - {version}, max(since + timeout - _now(), 0.0)
            await self._tier.ensure(version, sizes[version], timeout=left, beside=beside, since=since)

    def _missing(self, sizes: Sizes) -> AdapterVersion | None:
        """The first that is not at hand; None when all are."""
        return next((version for version in sorted(sizes) if not self._tier.is_at_hand(version)), None)


def _too_late(error: AdapterNotReady, num_versions: int, timeout: float) -> AdapterNotReady:
    kind = HostTierFull if isinstance(error, HostTierFull) else AdapterNotReady
    return kind(
        f"the {num_versions} adapters of this request were not in host memory together within {timeout:g} seconds; "
        "retry later, name fewer, or restart with a larger --cpu-lora-memory"
    )


def _now() -> float:
    """The loop's clock, by which waits end."""
    return asyncio.get_running_loop().time()
