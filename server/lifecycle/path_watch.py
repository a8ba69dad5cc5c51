"""Tells that something in a folder has changed, by the system's notifications, in a thread of its own.

A hint and no more: notifications get lost (queues overflow, network file systems send none, the folder is replaced, the
system has no watches left), so whoever uses this also looks for himself every few seconds. Setting up the watches of
thousands of folders takes a while, hence the thread.
"""

import asyncio
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from watchfiles import watch

logger = logging.getLogger(__name__)

_GROUP_MS, _STEP_MS = 200, 50  # changes that come within this are told together
_TIMEOUT_MS = 1000
_AGAIN_SECONDS = 1.0  # until a folder that cannot be watched is tried again


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchPace:
    """Seconds. `rescan` is the least between two looks at everything, `quiet` how long files must be at rest."""

    rescan: float = 3.0
    quiet: float = 0.3


class PathWatch:
    """Use as an async context manager; `recursive` watches everything beneath `folder`, else its own entries."""

    def __init__(self, folder: Path, *, recursive: bool) -> None:
        self._folder = folder.absolute()
        self._recursive = recursive
        self._stop = threading.Event()
        self._changed: set[Path] = set()
        self._is_told = asyncio.Event()
        self._last_error = ""

    async def __aenter__(self) -> "PathWatch":
        # It logs a line for every group of changes, which says nothing that our own log does not.
        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name=f"watch {self._folder.name}", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        await asyncio.to_thread(self._thread.join)

    async def changed(self, timeout: float) -> set[Path]:
        """The paths that changed since the last call, as soon as there are any; none after `timeout` seconds."""
        try:
            async with asyncio.timeout(max(0.0, timeout)):
                await self._is_told.wait()
        except TimeoutError:
            pass
        self._is_told.clear()
        changed, self._changed = self._changed, set()
        return changed

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._watch()
            except (OSError, RuntimeError) as error:  # the folder is not there, or no watches are left
                self._log(error)
            self._stop.wait(_AGAIN_SECONDS)

    def _watch(self) -> None:
        """Until stopped, or until the folder itself changed: it may be another one now."""
        for changes in watch(
            self._folder,
            watch_filter=None,
            debounce=_GROUP_MS,
            step=_STEP_MS,
            stop_event=self._stop,
            rust_timeout=_TIMEOUT_MS,
            recursive=self._recursive,
            ignore_permission_denied=True,
        ):
            paths = {Path(path) for _, path in changes}
            if not self._stop.is_set():
                self._loop.call_soon_threadsafe(self._note, paths)
            if self._folder in paths:
                return

    def _note(self, paths: set[Path]) -> None:
        self._changed |= paths
        self._is_told.set()

    def _log(self, error: Exception) -> None:
        if str(error) != self._last_error:
            self._last_error = str(error)
            logger.warning("%s is looked at every few seconds only: it cannot be watched (%s)", self._folder, error)
