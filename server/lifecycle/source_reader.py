"""Reads adapters from their sources and checks them, a few at a time. Knows no names and keeps nothing."""

import asyncio
from collections.abc import Callable
from functools import partial

from adapters.adapter_folder import AdapterFolder
from adapters.checkpoint import LoadedAdapter
from server.lifecycle.load_threads import NUM_THREADS, load_threads, on_lent_core
from server.lifecycle.sources.in_thread import in_thread
from server.lifecycle.sources.sources import Progress, Sources

ReadAdapter = Callable[[AdapterFolder], LoadedAdapter]
"""Reads and checks one folder, in a worker thread; raises AdapterError."""


def _ignore_progress(num_done: int, num_total: int | None) -> None:
    pass


def _ignore_fetched() -> None:
    pass


class SourceReader:
    def __init__(self, sources: Sources, read: ReadAdapter) -> None:
        self._sources = sources
        self._read = read
        self.threads = load_threads()
        self._reads = asyncio.Semaphore(NUM_THREADS)  # whoever is cancelled while it waits need not wait for a thread

    def check(self, source: str) -> None:
        """Raises AdapterError for what can be told from the source's text."""
        self._sources.check(source)

    async def read(
        self,
        source: str,
        *,
        progress: Progress = _ignore_progress,
        on_fetched: Callable[[], None] = _ignore_fetched,
    ) -> LoadedAdapter:
        """`on_fetched` is called between fetching and reading. Raises AdapterError."""
        async with self._sources.fetched(source, progress) as folder:
            on_fetched()
            async with self._reads:
                work = partial(on_lent_core, partial(self._read, folder))
                return await in_thread(work, executor=self.threads, wait_if_cancelled=True)  # it reads what is closed
