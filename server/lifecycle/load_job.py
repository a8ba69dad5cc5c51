"""One load, as those who wait for it see it. Knows nothing of how it is done."""

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from adapters.adapter_ref import AdapterRef
from server.lifecycle.control import WantedAdapter

_T = TypeVar("_T")


class LoadStage(StrEnum):
    FETCHING = "fetching"
    VALIDATING = "validating"


class ProgressUnit(StrEnum):
    BYTES = "bytes"  # fetched
    NORMS = "norms"  # of the base's rows, which DoRA's gains are computed from


class LoadOutcome(StrEnum):
    LOADED = "loaded"  # the name is new
    REPLACED = "replaced"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """What a load did."""

    ref: AdapterRef
    outcome: LoadOutcome


def _future() -> "asyncio.Future[_T]":
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True, eq=False)
class LoadJob:
    """`accepted` is set when the load is taken on (durably, for an API's caller), `done` when it has ended; either may
    hold the exception. Nobody's cancellation but `cancel` ends the work.
    """

    wanted: WantedAdapter
    pending: str | None = None  # what the record says of it; None: it says nothing
    record_created_at: float | None = None  # of that record: one that was deleted and made anew is another's
    is_foreign: bool = False  # another server took it on
    stage: LoadStage = LoadStage.FETCHING
    unit: ProgressUnit = ProgressUnit.BYTES  # what is counted
    num_done: int = 0
    num_total: int | None = None
    num_waiters: int = 0
    num_told: int = 0  # of those who asked for the load, how many wait and will be told of a failure
    accepted: "asyncio.Future[None]" = field(default_factory=_future)
    done: "asyncio.Future[AdapterLoad]" = field(default_factory=_future)
    task: "asyncio.Task[None] | None" = None

    def progress(self, unit: ProgressUnit, num_done: int, num_total: int | None) -> None:
        self.unit, self.num_done, self.num_total = unit, num_done, num_total

    def progress_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {"unit": self.unit.value, "done": self.num_done, "total": self.num_total}

    def fail(self, error: BaseException) -> None:
        """Tell whoever waits, now or later."""
        for future in (self.accepted, self.done):
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody has to ask

    async def wait(self, *, is_asker: bool = True) -> AdapterLoad:
        """Until it is done; raises what went wrong. Whoever stops waiting leaves the work going on. `is_asker` False:
        somebody who did not ask for the load, and whose being told of a failure is not enough.
        """
        self.num_waiters += 1
        self.num_told += is_asker
        try:
            return await asyncio.shield(self.done)
        finally:
            self.num_waiters -= 1
            self.num_told -= is_asker

    async def cancel(self) -> None:
        """End the work and wait until it has ended."""
        await asyncio.sleep(0)  # a task that is cancelled before its first step would not clean up after itself
        if self.task is not None and not self.task.done():
            self.task.cancel()
            await asyncio.wait({self.task})


async def wait_at_most(job: LoadJob, seconds: float, *, is_asker: bool = True) -> AdapterLoad | None:
    """The load, or None when it is not done by then. Raises what went wrong."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await job.wait(is_asker=is_asker)
    except TimeoutError:
        if not limit.expired():
            raise
        return job.done.result() if job.done.done() else None  # a failure that counts as told is told
