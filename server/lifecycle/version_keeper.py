"""What becomes of a version that is used less than before: out of host memory, off the disk. On the event loop.

Knows who holds a version from the registry, and nothing of names' records, requests or HTTP.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from adapters.adapter_ref import AdapterVersion
from adapters.registry import AdapterRegistry
from adapters.version_store import VersionStore
from server.errors import ServerError
from server.lifecycle.catalogue_errors import CatalogueError
from server.lifecycle.host_tier import HostTier
from server.lifecycle.version_locks import VersionLocks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, order=True)
class Freed:
    host_bytes: int = 0
    device_bytes: int = 0


class VersionKeeper:
    """`is_wanted` says whether requests may come for a version, `device_bytes_of` what it takes in the device's pools
    now; `refresh` takes over what other servers did.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        is_wanted: Callable[[AdapterVersion], bool],
        host: HostTier,
        store: VersionStore,
        locks: VersionLocks,
        *,
        device_bytes_of: Callable[[AdapterVersion], int],
        refresh: Callable[[], Awaitable[None]],
    ) -> None:
        self._registry = registry
        self._is_wanted = is_wanted
        self._host = host
        self._store = store
        self._locks = locks
        self._device_bytes_of = device_bytes_of
        self._refresh = refresh
        self._tasks: dict[AdapterVersion, asyncio.Task[Freed]] = {}
        self._again: set[AdapterVersion] = set()  # reviewed while they were being freed
        self._notes: list[tuple[AdapterVersion | None, list[Freed]]] = []

    def review(self, version: AdapterVersion) -> None:
        """A version that no request uses and none will come for leaves memory; one that nothing holds, the disk too."""
        if version in self._tasks:
            self._again.add(version)
        elif self._is_needless(version):
            device_bytes = self._device_bytes_of(version)
            task = self._tasks[version] = asyncio.get_running_loop().create_task(self._free(version, device_bytes))
            task.add_done_callback(lambda done: self._ended(version, done))

    @contextmanager
    def noting(self, version: AdapterVersion | None) -> Iterator[list[Freed]]:
        """What freeing the version gives back while the context lasts."""
        note = version, list[Freed]()
        self._notes.append(note)
        try:
            yield note[1]
        finally:
            self._notes = [each for each in self._notes if each is not note]

    async def until_freed(self, version: AdapterVersion | None) -> None:
        """Until the version is freed, if it is being freed now."""
        task = None if version is None else self._tasks.get(version)
        if task is not None:
            await asyncio.wait({task})

    async def settle(self) -> None:
        """Until nothing is being freed; for shutdown and tests."""
        while self._tasks:
            await asyncio.wait(self._tasks.values())
            await asyncio.sleep(0)

    def _is_needless(self, version: AdapterVersion) -> bool:
        if self._registry.num_leases(version) or self._is_wanted(version):
            return False
        return version in self._host or not self._registry.is_held(version)

    async def _free(self, version: AdapterVersion, device_bytes: int) -> Freed:
        async with self._locks.of(version):
            freed = await self._leave_memory(version, device_bytes) if self._is_needless(version) else Freed()
            if not await self._is_held_anywhere(version):
                await asyncio.to_thread(self._store.remove, version)
            return freed

    async def _is_held_anywhere(self, version: AdapterVersion) -> bool:
        """Also by a name that another server on the same database gave it just now."""
        if not self._registry.is_held(version):
            try:
                await self._refresh()
            except CatalogueError as error:
                logger.info("version %s stays on disk for now: %s", version[:12], error)
                return True
        return self._registry.is_held(version)

    async def _leave_memory(self, version: AdapterVersion, device_bytes: int) -> Freed:
        try:
            host_bytes = await self._host.drop(version)
        except ServerError as error:  # the engine is gone, and its memory with it
            logger.info("version %s not unloaded: %s", version[:12], error)
            return Freed()
        return Freed(host_bytes, device_bytes if host_bytes else 0)

    def _ended(self, version: AdapterVersion, task: "asyncio.Task[Freed]") -> None:
        if self._tasks.get(version) is task:
            del self._tasks[version]
        if version in self._again:
            self._again.discard(version)
            self.review(version)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            logger.error("version %s could not be freed", version[:12], exc_info=error)
            return
        for noted, freed in self._notes:
            if noted == version:
                freed.append(task.result())
