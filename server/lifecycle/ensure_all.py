"""Several adapter versions in host memory at one moment, for a request that is computed with all of them.

They are read one after the other. While the caller waits for one, its leases on the others hold nothing: who waits
never stands in the way of somebody else who waits, so nobody waits for ever; what was evicted meanwhile is read once
more. That alone would let two callers take the room from each other again and again, so whoever did not succeed at the
first attempt makes the next ones alone, in order of arrival. Knows neither names nor leases.
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
        self._turn = asyncio.Lock()  # of those who try again; first come, first served

    async def ensure(self, sizes: Sizes, timeout: float) -> None:
        """All versions are in host memory when this returns, at once when they are there, and stay while the caller's
        leases, one on each, are open. Raises AdapterCapacity when they never fit together, HostTierFull or
        AdapterNotReady after `timeout` seconds in all, QueueFull, and whatever reading one of them raised.
        """
        asked: set[AdapterVersion] = set()
        if self._missing(sizes) is not None:
            self._tier.check_together(sizes)
            try:
                await self._collect(sizes, asked, _now() + timeout)
            except AdapterNotReady as error:
                raise _too_late(error, len(sizes), timeout) from error
        # Nothing is awaited between the last look and the return, and from here on the leases hold.
        for version in sizes:
            if version not in asked:
                self._tier.hit(version)

    async def _collect(self, sizes: Sizes, asked: set[AdapterVersion], deadline: float) -> None:
        for version in sorted(sizes):  # once each, beside others who do the same
            if not self._tier.is_at_hand(version):
                await self._wait_for(version, sizes, asked, deadline)
        if self._missing(sizes) is None:
            return
        await self._wait_for_turn(sizes, deadline)
        try:
            while (missing := self._missing(sizes)) is not None:
                await self._wait_for(missing, sizes, asked, deadline)
        finally:
            self._turn.release()

    async def _wait_for(
        self, version: AdapterVersion, sizes: Sizes, asked: set[AdapterVersion], deadline: float
    ) -> None:
        """As a request for this version alone."""
        asked.add(version)
        with self._tier.setting_aside([other for other in sizes if other != version]):
            await self._tier.ensure(version, sizes[version], timeout=max(deadline - _now(), 0.0))

    async def _wait_for_turn(self, sizes: Sizes, deadline: float) -> None:
        try:
            with self._tier.setting_aside(sizes):
                async with asyncio.timeout_at(deadline):
                    await self._turn.acquire()
        except TimeoutError:
            raise AdapterNotReady("other requests for several adapters came first") from None

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
