"""Removes uploads that nothing was loaded from, or no longer is. Knows no weights."""

import asyncio
import logging
from collections.abc import Callable, Collection

from adapters.errors import AdapterError
from server.lifecycle.sources.upload_store import UploadStore

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0


async def sweep_uploads(uploads: UploadStore, used: Callable[[], Collection[str]]) -> None:
    """For ever. `used` gives the sources that names, versions and loads under way have. What was unused twice goes:
    an upload that has just come in is used only when its load has begun.
    """
    unused: frozenset[str] = frozenset()
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            ids, sources = await asyncio.to_thread(uploads.ids), used()
            now_unused = frozenset(upload_id for upload_id in ids if f"upload:{upload_id}" not in sources)
            for upload_id in unused & now_unused:
                await asyncio.to_thread(uploads.remove, upload_id)
            unused = now_unused
        except AdapterError as error:
            logger.warning("unused uploads could not be removed: %s", error)
