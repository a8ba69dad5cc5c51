"""Reads adapters from their sources and checks them, a few at a time. Knows no names and keeps nothing."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol

from adapters.adapter_folder import AdapterFolder
from adapters.checkpoint import LoadedAdapter
from adapters.read_options import ReadOptions
from server.lifecycle.load_job import ProgressUnit
from server.lifecycle.load_threads import NUM_THREADS, load_threads, on_lent_core
from server.lifecycle.sources.in_thread import in_thread
from server.lifecycle.sources.source_options import split_options
from server.lifecycle.sources.sources import Sources
from server.lifecycle.sources.thread_reports import ThreadReports

LoadProgress = Callable[[ProgressUnit, int, int | None], None]
"""(what is counted, how many are done, how many in all or None while that is not known), called on the event loop."""


class ReadAdapter(Protocol):
    """Reads and checks one folder, in a worker thread; raises AdapterError. `progress` is told of the norms that are
    computed, of loads that need some, and may be called thousands of times."""

    def __call__(
        self, folder: AdapterFolder, /, *, options: ReadOptions, progress: Callable[[int, int], object]
    ) -> LoadedAdapter: ...


def _ignore_progress(unit: ProgressUnit, num_done: int, num_total: int | None) -> None:
    pass


def _ignore_fetched() -> None:
    pass


class SourceReader:
    """A source may carry load options (sources/source_options.py)."""

    def __init__(self, sources: Sources, read: ReadAdapter) -> None:
        self._sources = sources
        self._read = read
        self.threads = load_threads()
        self._reads = asyncio.Semaphore(NUM_THREADS)  # whoever is cancelled while it waits need not wait for a thread

    def check(self, source: str) -> None:
        """Raises AdapterError for what can be told from the source's text."""
        self._sources.check(split_options(source)[0])

    async def read(
        self,
        source: str,
        *,
        progress: LoadProgress = _ignore_progress,
        on_fetched: Callable[[], None] = _ignore_fetched,
    ) -> LoadedAdapter:
        """`on_fetched` is called between fetching and reading. Raises AdapterError."""
        place, options = split_options(source)
        async with self._sources.fetched(place, partial(progress, ProgressUnit.BYTES)) as folder:
            on_fetched()
            async with self._reads:
                with ThreadReports(partial(progress, ProgressUnit.NORMS)) as reports:
                    read = partial(self._read, folder, options=options, progress=reports.from_thread)
                    work = partial(on_lent_core, read)
                    # it reads what is closed
                    return await in_thread(work, executor=self.threads, wait_if_cancelled=True)
