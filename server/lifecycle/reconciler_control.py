"""What reconcilers ask of the adapters (control.AdapterControl), in terms of what the service does anyway."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from adapters.errors import AdapterAlreadyLoaded
from server.lifecycle.alias_service import AliasService
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.control import FILE_OWNER, FOLDER_OWNER, MISS_OWNER, START_OWNER, WantedAdapter
from server.lifecycle.directory import AdapterDirectory
from server.lifecycle.errors import NameConflict
from server.lifecycle.load_job import LoadJob
from server.lifecycle.name_changes import wanted_of
from server.lifecycle.unloading import Unloaded

logger = logging.getLogger(__name__)


class ReconcilerControl(ABC):
    directory: AdapterDirectory
    aliases: AliasService

    @abstractmethod
    async def submit(self, wanted: WantedAdapter) -> LoadJob: ...

    @abstractmethod
    async def unload(self, name: str, *, abort: bool = False, deadline: float | None = None) -> Unloaded: ...

    async def apply(self, wanted: WantedAdapter) -> None:
        owner = self.owner_of(wanted.name)
        if owner not in (None, MISS_OWNER, wanted.managed_by) and wanted.managed_by in (FILE_OWNER, FOLDER_OWNER):
            raise AdapterAlreadyLoaded(f"{wanted.name!r} is managed by {owner}, not by {wanted.managed_by}")
        await (await self.submit(wanted)).wait()

    async def remove(self, name: str) -> None:
        await self.unload(name)

    async def put_alias(self, name: str, targets: Sequence[AliasTarget], *, managed_by: str = "api") -> None:
        await self.aliases.put(name, targets, managed_by=managed_by)

    async def remove_alias(self, name: str) -> None:
        await self.aliases.remove(name)

    def aliases_managed(self, owner: str) -> Mapping[str, Sequence[AliasTarget]]:
        return self.aliases.managed(owner)

    def managed(self, owner: str) -> Mapping[str, WantedAdapter]:
        records = [record for record in self.directory.records.values() if record.managed_by == owner]
        return {record.name: wanted_of(record) for record in records if record.source is not None}

    def wanted(self, name: str) -> WantedAdapter | None:
        record = self.directory.records.get(name)
        return None if record is None or record.source is None else wanted_of(record)

    def owner_of(self, name: str) -> str | None:
        record = self.directory.records.get(name) or self.directory.aliases.get(name)
        return None if record is None else record.managed_by

    async def forget_start(self, names: Sequence[str]) -> None:
        """Take away what an earlier start's command line named and this one's does not."""
        for name in self.managed(START_OWNER).keys() - set(names):
            try:
                await self.unload(name)
            except NameConflict as error:  # no reason not to start: it can only be mended on a server that runs
                logger.warning("%s is not named any more and stays: %s", name, error)
