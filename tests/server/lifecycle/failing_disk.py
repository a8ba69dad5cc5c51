"""A disk that fails at the n-th call of all that write, makes, renames or flushes something."""

import os
from pathlib import Path

from server.lifecycle.sources.disk import Disk


class FailingDisk(Disk):
    """`number` is the errno; `max_write` makes writes short. Fails only after `fail_at`."""

    def __init__(self, number: int, *, max_write: int | None = None) -> None:
        self._number = number
        self._max_write = max_write
        self._left: int | None = None
        self.has_failed = False

    def fail_at(self, call: int) -> None:
        self._left = call
        self.has_failed = False

    def _count(self) -> None:
        if self._left is None:
            return
        self._left -= 1
        if self._left < 0:
            self._left = None  # once: what cleans up afterwards may succeed
            self.has_failed = True
            raise OSError(self._number, os.strerror(self._number))

    def make_folder(self, path: Path) -> None:
        self._count()
        super().make_folder(path)

    def create(self, path: Path) -> int:
        self._count()
        return super().create(path)

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        self._count()
        return super().write(descriptor, data[: self._max_write])

    def sync(self, descriptor: int) -> None:
        self._count()
        super().sync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        self._count()
        super().rename(old, new)

    def touch(self, path: Path) -> None:
        self._count()
        super().touch(path)
