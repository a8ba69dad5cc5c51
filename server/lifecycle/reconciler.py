"""Brings what one owner manages from where it stands to what is wanted, each name by itself, again after failures.

Generic over what a goal is: a folder with its fingerprint, an entry of a file, an alias. Only names that this owner
once had and that are not wanted any more are taken away. A name that was taken away by somebody else, or ran out of its
time to live, is left alone until its goal changes: an operator's hand is not fought every few seconds.

Owned by the event loop. Knows nothing of files, folders or YAML.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from adapters.errors import AdapterAlreadyLoaded, AdapterError, AdapterNotFound
from adapters.untrusted_json import shown
from server.errors import ServerError
from server.lifecycle.control import MISS_OWNER

logger = logging.getLogger(__name__)

Goal = TypeVar("Goal")

_FIRST_RETRY, _LAST_RETRY = 1.0, 300.0  # seconds after a failure; doubles with each
_MAX_PARALLEL = 16  # applied at once; how much is read at once is for the control to bound
_MAX_WHY = 600  # characters of a failure in the log


@dataclass(frozen=True, slots=True, kw_only=True)
class Deeds(Generic[Goal]):
    """What is done for a name. `owner_of` says who has a name; `is_final` which failures only another goal can mend."""

    owner: str
    kind: str  # adapter or alias, for the log
    apply: Callable[[str, Goal], Awaitable[None]]
    remove: Callable[[str], Awaitable[None]]
    owner_of: Callable[[str], str | None]
    is_final: Callable[[Exception], bool] = lambda _: False


@dataclass(frozen=True, slots=True)
class _Failure(Generic[Goal]):
    goal: Goal | None  # None: it was to be taken away
    why: str
    tries: int
    retry_at: float  # of the clock; infinite when only another goal can mend it


class Reconciler(Generic[Goal]):
    """`standing` is what the owner has at the start: name → the goal that was reached, None when that is not known."""

    def __init__(
        self,
        deeds: Deeds[Goal],
        standing: Mapping[str, Goal | None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.standing: dict[str, Goal | None] = dict(standing)
        self.num_changes = 0  # of `standing`
        self._deeds = deeds
        self._clock = clock
        self._goals: dict[str, Goal] = {}
        self._failures: dict[str, _Failure[Goal]] = {}
        self._tasks: dict[str, tuple[asyncio.Task[None], bool]] = {}  # (task, it applies)
        self._slots = asyncio.Semaphore(_MAX_PARALLEL)

    def aim(self, goals: Mapping[str, Goal]) -> None:
        """These are wanted from now on, and nothing else. Returns at once; also starts the retries that are due."""
        self._goals = dict(goals)
        for name in [name for name in self._failures if name not in goals and name not in self.standing]:
            del self._failures[name]
        for name in [*self._goals, *(name for name in self.standing if name not in self._goals)]:
            self._consider(name)

    @property
    def next_retry(self) -> float:
        """When `aim` should be called again, of the clock; infinite when there is nothing to retry."""
        waiting = (failure.retry_at for name, failure in self._failures.items() if name not in self._tasks)
        return min(waiting, default=math.inf)

    @property
    def failures(self) -> Mapping[str, str]:
        """Name → why it is not as wanted."""
        return {name: failure.why for name, failure in self._failures.items()}

    async def applied(self, names: Collection[str]) -> None:
        """Wait until none of `names` is being applied any more, whether it went well or not."""
        await self._ended([task for name, (task, applies) in self._tasks.items() if applies and name in names])

    async def idle(self) -> None:
        """Wait for everything that is under way now."""
        await self._ended([task for task, _ in self._tasks.values()])

    async def close(self) -> None:
        """Cancel what is under way; names stay as they are."""
        tasks = [task for task, _ in self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _ended(tasks: Collection[asyncio.Task[None]]) -> None:
        if tasks:
            await asyncio.wait(tasks)

    def _consider(self, name: str) -> None:
        """Start what brings `name` to its goal, unless it is there, on its way, or to be tried again later."""
        goal = self._goals.get(name)
        if name in self._tasks:
            return
        if self._is_in_place(name, goal):
            self._failures.pop(name, None)
            return
        failure = self._failures.get(name)
        if failure is not None and failure.goal == goal and self._clock() < failure.retry_at:
            return
        task = asyncio.create_task(self._carry_out(name, goal))
        self._tasks[name] = (task, goal is not None)
        task.add_done_callback(lambda task: self._task_ended(name, task))

    def _is_in_place(self, name: str, goal: Goal | None) -> bool:
        return name not in self.standing if goal is None else self.standing.get(name) == goal

    def _task_ended(self, name: str, task: asyncio.Task[None]) -> None:
        del self._tasks[name]
        if not task.cancelled():
            self._consider(name)  # its goal may have moved on meanwhile

    async def _carry_out(self, name: str, goal: Goal | None) -> None:
        try:
            if goal is None:
                await self._take_away(name)
            else:
                await self._put(name, goal)
        except Exception as error:
            self._failed(name, goal, error)
        else:
            self._failures.pop(name, None)
            self.num_changes += 1

    async def _put(self, name: str, goal: Goal) -> None:
        async with self._slots:
            owner = self._deeds.owner_of(name)
            if owner not in (None, self._deeds.owner, MISS_OWNER):
                raise AdapterAlreadyLoaded(f"the name belongs to what was loaded by {owner}; unload that first")
            self.standing.setdefault(name, None)  # a load that fails may leave a record behind, which is ours
            await self._deeds.apply(name, goal)
        self.standing[name] = goal
        logger.info("%s %s is as the %s has it", self._deeds.kind, shown(name), self._deeds.owner)

    async def _take_away(self, name: str) -> None:
        # Not under a slot: taking away may wait for others, and those for a slot.
        if self._deeds.owner_of(name) == self._deeds.owner:
            try:
                await self._deeds.remove(name)
            except AdapterNotFound:
                pass  # another replica, or an operator, was first
            else:
                logger.info(
                    "%s %s is taken away: the %s has it no more", self._deeds.kind, shown(name), self._deeds.owner
                )
        self.standing.pop(name, None)

    def _failed(self, name: str, goal: Goal | None, error: Exception) -> None:
        before = self._failures.get(name)
        is_again = before is not None and before.goal == goal
        tries = before.tries + 1 if before is not None and is_again else 1
        wait = math.inf if self._deeds.is_final(error) else min(_FIRST_RETRY * 2.0 ** min(tries - 1, 20), _LAST_RETRY)
        why = shown(str(error) or type(error).__name__, _MAX_WHY)
        self._failures[name] = _Failure(goal, why, tries, self._clock() + wait)
        if before is None or not is_again or before.why != why:
            self._log(name, goal, why, error, wait)

    def _log(self, name: str, goal: Goal | None, why: str, error: Exception, wait: float) -> None:
        """Once for each goal and reason: retries are silent until they end otherwise."""
        deed = "taken away" if goal is None else "applied"
        then = "it is tried again when it changes" if math.isinf(wait) else "it is tried again"
        is_told = isinstance(error, AdapterError | ServerError | OSError)
        logger.warning(
            "%s %s of the %s cannot be %s: %s; %s",
            *(self._deeds.kind, shown(name), self._deeds.owner, deed, why, then),
            exc_info=None if is_told else error,
        )
