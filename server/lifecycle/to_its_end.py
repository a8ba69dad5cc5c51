"""Work that is not left half done because nobody waits for it any more."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


async def to_its_end(change: Coroutine[Any, Any, _T]) -> _T:
    """A caller that is cancelled is still waited for: a change that is durable must be in force too."""
    task = asyncio.create_task(change)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("a change whose caller is gone failed: %s", error)
        raise
