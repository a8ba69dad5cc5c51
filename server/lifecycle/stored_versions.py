"""A version's weights for host memory: from this machine's disk, or from where it came when they are not there.

Knows where versions came from, from the directory, and nothing of names' records, host memory or requests.
"""

import asyncio
import logging
from functools import partial

from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterError, VersionDamaged, VersionStoreFailed, VersionStoreFull
from adapters.lora_model import LoRAModel
from adapters.version_store import VersionStore
from server.lifecycle.directory import AdapterDirectory
from server.lifecycle.errors import SourceChanged
from server.lifecycle.load_threads import on_lent_core
from server.lifecycle.source_reader import SourceReader

logger = logging.getLogger(__name__)


class StoredVersions:
    def __init__(self, store: VersionStore, sources: SourceReader, directory: AdapterDirectory) -> None:
        self._store = store
        self._sources = sources
        self._directory = directory

    async def read(self, version: AdapterVersion) -> LoRAModel:
        """Raises AdapterError."""
        try:
            return await asyncio.to_thread(on_lent_core, partial(self._store.read, version))
        except KeyError:
            pass
        except (VersionDamaged, VersionStoreFailed) as error:
            logger.error("%s; it is read from its source again", error)
        model = await self._from_source(version)
        try:  # without the version's lock: whoever holds it may wait for this read
            await asyncio.to_thread(on_lent_core, partial(self._store.put, model))
        except (VersionStoreFull, VersionStoreFailed) as error:
            logger.error("version %s is served from memory only: %s", version[:12], error)
        return model

    async def _from_source(self, version: AdapterVersion) -> LoRAModel:
        """From the first of the places it was loaded from that still holds it; raises what the first one said."""
        failure: AdapterError | None = None
        for source in self._directory.sources_of(version):
            try:
                model = (await self._sources.read(source)).model
            except AdapterError as error:
                failure = failure or error
                continue
            if model.version == version:
                return model
            failure = failure or SourceChanged(
                f"the weights of version {version[:12]} are not on this machine, and its source holds others now "
                f"(version {model.version[:12]}); load the adapter again"
            )
        raise failure or SourceChanged(f"nothing is known of where version {version[:12]} came from")
