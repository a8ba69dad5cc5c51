"""Pinned versions that are being brought into memory in the background, a task each. Knows no budget and no engine."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from adapters.adapter_ref import AdapterVersion

logger = logging.getLogger(__name__)


class PinTasks:
    """`load` brings a version into memory, and waits as long as that takes."""

    def __init__(self, load: Callable[[AdapterVersion, int], Awaitable[None]]) -> None:
        self._load = load
        self._tasks: dict[AdapterVersion, asyncio.Task[None]] = {}

    def __contains__(self, version: object) -> bool:
        return version in self._tasks

    def start(self, version: AdapterVersion, num_bytes: int) -> None:
        task = self._tasks[version] = asyncio.get_running_loop().create_task(self._run(version, num_bytes))
        task.add_done_callback(lambda done: self._forget(version, done))

    def cancel(self, version: AdapterVersion) -> "asyncio.Task[None] | None":
        """The task, which ends soon, if there was one."""
        task = self._tasks.pop(version, None)
        if task is not None:
            task.cancel()
        return task

    def cancel_all(self) -> tuple["asyncio.Task[None]", ...]:
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        return tasks

    def _forget(self, version: AdapterVersion, done: "asyncio.Task[None]") -> None:
        if self._tasks.get(version) is done:
            del self._tasks[version]

    async def _run(self, version: AdapterVersion, num_bytes: int) -> None:
        try:
            await self._load(version, num_bytes)
        except Exception as error:
            logger.warning("pinned version %s is not in memory, and read when asked for: %s", version[:12], error)
