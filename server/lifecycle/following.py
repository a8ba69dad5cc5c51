"""Looks again and again for what other servers on the same catalogue change."""

import asyncio
import logging

from server.lifecycle.catalogue_errors import CatalogueError
from server.lifecycle.directory import AdapterDirectory

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25


async def follow(directory: AdapterDirectory) -> None:
    """Take over what other servers change, for ever."""
    is_reachable = True
    while True:
        await asyncio.sleep(POLL_SECONDS)
        try:
            await directory.refresh()
            is_reachable = True
        except CatalogueError as error:
            if is_reachable:  # said once
                logger.warning("the catalogue cannot be read, so changes by other servers are not seen: %s", error)
            is_reachable = False
        except Exception:  # whatever it is, later changes must not go unseen
            logger.exception("changes by other servers could not be taken over")
