"""What a load that failed leaves behind: nothing where somebody was told, else a record that says why."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from adapters.errors import AdapterError
from server.errors import ServerError
from server.lifecycle.control import FILE_OWNER, FOLDER_OWNER, MISS_OWNER, WantedAdapter
from server.lifecycle.directory import AdapterDirectory
from server.lifecycle.load_job import LoadJob
from server.lifecycle.pending_load import announced, pending_text

logger = logging.getLogger(__name__)

_AGAIN_SECONDS = 1.0


class FailedLoads:
    """`name_lock` gives the lock under which a name is changed."""

    def __init__(self, directory: AdapterDirectory, name_lock: Callable[[str], asyncio.Lock]) -> None:
        self._directory = directory
        self._name_lock = name_lock
        self._later: set[asyncio.Task[None]] = set()  # failures the catalogue did not take

    async def record(self, job: LoadJob, error: BaseException) -> bool:
        """Whether somebody waits who can be told. The name's lock is held; raises nothing, so that the job ends."""
        was_told = job.num_told > 0
        await self._record_or_later(job.wanted, error, was_told=was_told)
        if was_told and not job.num_told:  # they stopped waiting meanwhile
            was_told = False
            await self._record_or_later(job.wanted, error, was_told=was_told)
        return was_told

    def close(self) -> None:
        for task in self._later:
            task.cancel()

    async def _record_or_later(self, wanted: WantedAdapter, error: BaseException, *, was_told: bool) -> None:
        try:
            await self._directory.retried(lambda: self._record(wanted, error, was_told=was_told))
        except BaseException as second:  # one more cancellation, too
            logger.error("the failed load of %s could not be recorded yet: %s", wanted.name, second)
            later = asyncio.create_task(self._record_later(wanted, error, was_told=was_told))
            self._later.add(later)
            later.add_done_callback(self._later.discard)

    async def _record_later(self, wanted: WantedAdapter, error: BaseException, *, was_told: bool) -> None:
        """Until the record does not say any more that the load is under way."""
        while True:
            await asyncio.sleep(_AGAIN_SECONDS)
            async with self._name_lock(wanted.name):
                record = self._directory.records.get(wanted.name)
                if record is None or record.pending != pending_text(wanted):
                    return
                with suppress(ServerError):
                    await self._record(wanted, error, was_told=was_told)

    async def _record(self, wanted: WantedAdapter, error: BaseException, *, was_told: bool) -> None:
        """A reconciler's failures are for whoever looks; a caller who waited has been told, and all is as before."""
        if isinstance(error, asyncio.CancelledError) or wanted.managed_by == MISS_OWNER:
            return  # a load that a shutdown ended goes on at the next start
        is_told = was_told and wanted.managed_by not in (FILE_OWNER, FOLDER_OWNER)
        record = self._directory.records.get(wanted.name)
        if record is None and not is_told:
            record = replace(announced(None, wanted), source=wanted.source)
        if record is None or record.pending not in (None, pending_text(wanted)):
            return  # another server loads the name, and will tell how that ends
        if is_told and record.version is None:
            await self._directory.delete(record)
            return
        failure = None if is_told else (_code_of(error), str(error))
        if record.version is None:
            record = replace(record, source=wanted.source)
        if (record.pending, record.failure) != (None, failure):
            await self._directory.put(replace(record, pending=None, failure=failure))


def _code_of(error: BaseException) -> str:
    code = error.code if isinstance(error, AdapterError | ServerError) else None
    return code or "internal_error"
