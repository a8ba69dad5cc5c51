"""Gives up versions that are on disk or in memory and that nothing leads to: left by a crash between writing the
weights and writing the record, or by a record whose fate was unknown. Knows no names.
"""

import asyncio
import logging
from collections.abc import Callable, Collection

from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterError

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0


async def sweep_versions(
    present: Callable[[], Collection[AdapterVersion]],
    is_held: Callable[[AdapterVersion], bool],
    give_up: Callable[[AdapterVersion], None],
) -> None:
    """For ever. `present` blocks. What was unused twice goes: one of a load under way, on this server or on another in
    the same folder, gets its name within that time.
    """
    unused: frozenset[AdapterVersion] = frozenset()
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            found = await asyncio.to_thread(present)
        except AdapterError as error:
            logger.warning("unused versions could not be looked for: %s", error)
            continue
        except Exception:  # whatever it is, those of later must go all the same
            logger.exception("unused versions could not be looked for")
            continue
        now_unused = frozenset(version for version in found if not is_held(version))
        for version in unused & now_unused:
            give_up(version)
        unused = now_unused
