"""Takes names away whose time is over, and forgets failed loads that nobody asked about. Knows no adapters' weights."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from adapters.errors import AdapterNotFound
from server.lifecycle.catalogue_errors import CatalogueConflict
from server.lifecycle.catalogue_records import AdapterRecord
from server.lifecycle.unloading import StillWanted

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
KEEP_FAILED_SECONDS = 3600.0


def is_over(record: AdapterRecord, now: float) -> bool:
    """Whether a name is to go: its `ttl` after its last change, or long after a first load that failed."""
    lifetime = record.ttl
    if record.version is None and record.failure is not None:
        lifetime = KEEP_FAILED_SECONDS if lifetime is None else min(lifetime, KEEP_FAILED_SECONDS)
    return lifetime is not None and record.pending is None and now > record.updated_at + lifetime


async def sweep_forever(records: Mapping[str, AdapterRecord], remove: Callable[[str], Awaitable[object]]) -> None:
    """`remove` must look at the record again: its time may have been prolonged while others were taken away."""
    told: dict[str, str] = {}  # name → why it could not go, said once
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        now = time.time()
        over = [name for name, record in records.items() if is_over(record, now)]
        told = {name: why for name, why in told.items() if name in over}
        for name in over:
            try:
                await remove(name)
                logger.info("adapter %s is taken away: its time is over", name)
            except (AdapterNotFound, CatalogueConflict, StillWanted):
                pass  # somebody was faster, another server perhaps
            except Exception as error:  # the others must go all the same
                if told.get(name) != str(error):
                    told[name] = str(error)
                    logger.warning("adapter %s should go, its time being over: %s", name, error)
