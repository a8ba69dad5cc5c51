"""Who wants to know that an adapter changed, and what changed since they last looked. Knows nothing of adapters.

A reader that is slow misses steps in between, never the last one: only names are kept, each once, so the memory of a
reader is bounded by the number of names.
"""

import asyncio
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self


class AdapterEvents:
    def __init__(self) -> None:
        self._readers: set[AdapterChanges] = set()

    def publish(self, name: str) -> None:
        """`name` is not what it was: its state, its version, or whether it is there at all."""
        for reader in self._readers:
            reader.add(name)

    def end(self) -> None:
        """There will be no more: the server shuts down."""
        for reader in self._readers:
            reader.end()

    @property
    def num_readers(self) -> int:
        return len(self._readers)

    def changes(self) -> "AdapterChanges":
        """The names that change from now on, while the context lasts."""
        return AdapterChanges(self._readers)


class AtMostEvery:
    """Calls `tell` when it is called, but for calls that come sooner than `seconds` after one that did."""

    def __init__(self, seconds: float, tell: Callable[[], None]) -> None:
        self._seconds = seconds
        self._tell = tell
        self._next = -math.inf

    def __call__(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._seconds
            self._tell()


class AdapterChanges:
    """One reader's names. `next` may be called again and again, by one task at a time."""

    def __init__(self, readers: "set[AdapterChanges]") -> None:
        self._readers = readers
        self._names: dict[str, None] = {}
        self._has_some = asyncio.Event()
        self._has_ended = False
        readers.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """No change is kept from now on; idempotent."""
        self._readers.discard(self)

    def add(self, name: str) -> None:
        self._names[name] = None
        self._has_some.set()

    def end(self) -> None:
        """`next` gives what is left, then None."""
        self._has_ended = True
        self._has_some.set()

    async def next(self) -> str | None:
        """The name whose change is the oldest not yet told; None at the end."""
        await self._has_some.wait()
        name = next(iter(self._names), None)
        if name is not None:
            del self._names[name]
        if not self._names and not self._has_ended:
            self._has_some.clear()
        return name
