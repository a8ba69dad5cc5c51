"""Removes uploads that nothing was loaded from, or no longer is. Knows no weights."""

import asyncio
import logging
from collections.abc import Callable, Collection

from adapters.errors import AdapterError
from server.lifecycle.sources.upload_store import UploadStore

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0

Unused = frozenset[tuple[str, int]]
"""Uploads by id, each with when it was last received."""


async def sweep_uploads(uploads: UploadStore, used: Callable[[], Collection[str]]) -> None:
    """For ever. `used` gives the sources that names, versions and loads under way have."""
    unused: Unused = frozenset()
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            unused = await sweep_once(uploads, used, unused)
        except AdapterError as error:
            logger.warning("unused uploads could not be removed: %s", error)
        except Exception:  # whatever it is, those of later must go all the same
            logger.exception("unused uploads could not be removed")


async def sweep_once(uploads: UploadStore, used: Callable[[], Collection[str]], unused: Unused) -> Unused:
    """What is unused now. What was so at the last sweep too goes, if it was not received again in between: an upload
    that has just come in is used only when its load has begun.
    """
    found = await asyncio.to_thread(uploads.received)
    sources = {source.partition("#")[0] for source in used()}  # without the options it is loaded with
    now_unused = frozenset(each for each in found.items() if f"upload:{each[0]}" not in sources)
    for upload_id, received in unused & now_unused:
        await asyncio.to_thread(uploads.remove, upload_id, received=received)
    return now_unused
