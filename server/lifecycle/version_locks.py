"""One lock per version: held while its bytes are written, or removed because nobody holds it any more."""

import asyncio
import weakref

from adapters.adapter_ref import AdapterVersion


class VersionLocks:
    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[AdapterVersion, asyncio.Lock] = weakref.WeakValueDictionary()

    def of(self, version: AdapterVersion) -> asyncio.Lock:
        return self._locks.setdefault(version, asyncio.Lock())
