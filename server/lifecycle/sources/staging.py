"""Private folders for what is being fetched or received, each gone again at the end, whatever the end was.

A process has a folder of its own, which it holds locked while it lives. Whoever starts removes the folders that nobody
holds any more, so that a killed process leaves nothing for longer than until the next start, and two processes may
share the place. Knows nothing of what is put there.
"""

import fcntl
import os
import secrets
from pathlib import Path

from server.lifecycle.sources.disk import Disk, remove_tree, storage_errors


class Staging:
    """Folders below `folder`, which is made if need be. Raises AdapterStorageFull, AdapterStorageFailed."""

    def __init__(self, folder: Path, *, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        with storage_errors():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            whole = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(whole, fcntl.LOCK_EX)  # nobody sees a folder between its making and its locking
                _remove_leftovers(folder)
                self.folder = folder / secrets.token_hex(8)
                self._disk.make_folder(self.folder)
                self._lock: int | None = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(whole)

    def new_folder(self) -> Path:
        """An empty folder that only this user may enter; the caller removes it with `disk.remove_tree`."""
        path = self.folder / secrets.token_hex(8)
        with storage_errors():
            self._disk.make_folder(path)
        return path

    def close(self) -> None:
        if self._lock is not None:
            remove_tree(self.folder)
            os.close(self._lock)
            self._lock = None


def _remove_leftovers(folder: Path) -> None:
    for entry in sorted(folder.iterdir()):
        try:
            descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # not a folder, so not ours
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_tree(entry)
        except BlockingIOError:
            pass  # its process lives
        finally:
            os.close(descriptor)
