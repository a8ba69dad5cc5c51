"""What a load that failed leaves behind: nothing where somebody was told, else a record that says why."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from adapters.errors import AdapterError
from server.errors import ServerError, Unavailable
from server.lifecycle.control import FILE_OWNER, FOLDER_OWNER, MISS_OWNER
from server.lifecycle.directory import AdapterDirectory
from server.lifecycle.errors import AdapterLoadCancelled
from server.lifecycle.load_job import LoadJob
from server.lifecycle.pending_load import announced

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
        await self._record_or_later(job, error, was_told=was_told)
        if was_told and not job.num_told:  # they stopped waiting meanwhile
            was_told = False
            await self._record_or_later(job, error, was_told=was_told)
        return was_told

    def close(self) -> None:
        for task in self._later:
            task.cancel()

    async def _record_or_later(self, job: LoadJob, error: BaseException, *, was_told: bool) -> None:
        if _goes_on(job, error):
            return
        try:
            await self._directory.retried(lambda: self._record(job, error, was_told=was_told))
        except BaseException as second:  # one more cancellation, too
            logger.error("the failed load of %s could not be recorded yet: %s", job.wanted.name, second)
            later = asyncio.create_task(self._record_later(job, error, was_told=was_told))
            self._later.add(later)
            later.add_done_callback(self._later.discard)

    async def _record_later(self, job: LoadJob, error: BaseException, *, was_told: bool) -> None:
        """Until the record does not say any more that the load is under way."""
        while True:
            await asyncio.sleep(_AGAIN_SECONDS)
            async with self._name_lock(job.wanted.name):
                record = self._directory.records.get(job.wanted.name)
                if record is None or record.pending is None or record.pending != job.pending:
                    return
                with suppress(ServerError, AdapterError):
                    await self._directory.retried(lambda: self._record(job, error, was_told=was_told))

    async def _record(self, job: LoadJob, error: BaseException, *, was_told: bool) -> None:
        """A reconciler's failures are for whoever looks; a caller who waited has been told, and all is as before."""
        wanted = job.wanted
        is_told = was_told and wanted.managed_by not in (FILE_OWNER, FOLDER_OWNER)
        record = self._directory.records.get(wanted.name)
        if record is None and not is_told:
            record = replace(announced(None, wanted, job.pending), source=wanted.source)
        if record is None or record.pending not in (None, job.pending):
            return  # another server loads the name, and will tell how that ends
        if is_told and record.version is None:
            await self._directory.delete(record)
            return
        failure = None if is_told else (_code_of(error), str(error))
        if record.version is None:
            record = replace(record, source=wanted.source)
        if (record.pending, record.failure) != (None, failure):
            await self._directory.put(replace(record, pending=None, failure=failure))


def _goes_on(job: LoadJob, error: BaseException) -> bool:
    """What the record says stays: the load goes on at the next start, or at the server that took it on, or the name is
    gone. Nor is anything said of a name that nobody registered.
    """
    is_ended = isinstance(error, asyncio.CancelledError | Unavailable | AdapterLoadCancelled)
    return is_ended or job.is_foreign or job.wanted.managed_by == MISS_OWNER


def _code_of(error: BaseException) -> str:
    code = error.code if isinstance(error, AdapterError | ServerError) else None
    return code or "internal_error"
