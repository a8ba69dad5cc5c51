"""From names to versions that are held and in memory: what requests ask of the adapters. A part of the service.

Knows nothing of how names come to be, or of what a request does with what it holds.
"""

from collections.abc import Sequence

from adapters.adapter_ref import Lease
from adapters.registry import AdapterRegistry
from server.errors import ModelNotFound
from server.lifecycle.adapter_loader import AdapterLoader
from server.lifecycle.directory import AdapterDirectory
from server.lifecycle.ensure_all import EnsureAll
from server.lifecycle.host_tier import HostTier
from server.lifecycle.model_names import ModelNames
from server.lifecycle.waiting_for_names import WaitingForNames


class AdapterLeases:
    directory: AdapterDirectory
    registry: AdapterRegistry
    loader: AdapterLoader
    host: HostTier
    names: ModelNames
    misses: WaitingForNames
    together: EnsureAll
    cold_timeout: float  # seconds

    @property
    def base_names(self) -> Sequence[str]:
        return self.names.base_names

    def acquire(self, model: str, key: str | None = None) -> Lease | None:
        """Resolve what a client asked for and hold it; None = the base model. Raises ModelNotFound.

        `key` (the user or seed of the request) keeps an alias's choice the same. The version may not be in memory yet:
        `ready` waits for it.
        """
        named = self.names.resolve(model, key)
        if named is None:
            return None
        if named.version is None:
            return self.registry.acquire(named.name)
        return self.registry.acquire_version(named.name, named.version)

    async def resolve(self, model: str, key: str | None = None) -> Lease | None:
        """`acquire`, waiting for a name that is being loaded or can be found. Raises ModelNotFound, AdapterNotReady,
        AdapterFailed.
        """
        try:
            return self.acquire(model, key)
        except ModelNotFound:
            for name in self.names.candidates(model):
                if await self.misses.wait(name):
                    return self.acquire(model, key)
            raise

    def expects(self, model: str) -> bool:
        """An adapter of that very name is known or being loaded, whether it can be acquired yet or not."""
        return any(name in self.loader.jobs or name in self.directory.records for name in self.names.candidates(model))

    def is_ready(self, lease: Lease) -> bool:
        """`ready` would return at once."""
        return self.host.is_at_hand(lease.ref.version)

    async def ready(self, lease: Lease | None) -> None:
        """The leased version is in host memory when this returns, at once when it was there, and stays while the lease
        is open. Raises AdapterNotReady, QueueFull, and what reading it raises.
        """
        await self.ready_all(() if lease is None else (lease,))

    async def ready_all(self, leases: Sequence[Lease]) -> None:
        """As `ready`, of several versions at one moment, no two alike. Raises AdapterCapacity when they never fit."""
        if len(leases) > 1:
            await self.together.ensure({each.ref.version: each.ref.num_bytes for each in leases}, self.cold_timeout)
        else:
            for lease in leases:
                await self.host.ensure(lease.ref.version, lease.ref.num_bytes, timeout=self.cold_timeout)
