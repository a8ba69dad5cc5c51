"""What is written to the server's own disk, one method for each call of the system, so that a test can fail any.

Every failure becomes AdapterStorageFull or AdapterStorageFailed here, apart from the failures of networks, which are
OSErrors as well. Knows nothing of what is written.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.lifecycle.sources.errors import AdapterStorageFailed, AdapterStorageFull

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Disk:
    """The real one. Raises OSError as the system does; callers wrap it in `storage_errors`."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(mode=0o700)

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def touch(self, path: Path) -> None:
        os.utime(path)

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)


class NewFile:
    """A file being written. Used as a context; what stays on disk after an error is its folder's owner to remove."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        with storage_errors():
            self._descriptor = disk.create(path)
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """All of it. Raises AdapterStorageFull, AdapterStorageFailed."""
        rest = memoryview(data)
        with storage_errors():
            while rest:
                count = self._disk.write(self._descriptor, rest)
                self.num_bytes += count
                rest = rest[count:]

    def sync(self) -> None:
        with storage_errors():
            self._disk.sync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns OSError into AdapterStorageFull or AdapterStorageFailed, by its number."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else "unknown"
        if error.errno in _FULL:
            raise AdapterStorageFull(f"the server's disk has no room for the adapter ({reason})") from error
        raise AdapterStorageFailed(f"the server's disk failed while it kept the adapter ({reason})") from error


def remove_tree(path: Path) -> None:
    """A folder and all in it; what cannot be removed now is left to the next start."""
    shutil.rmtree(path, ignore_errors=True)
