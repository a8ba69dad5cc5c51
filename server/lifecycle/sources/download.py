"""One adapter from a remote folder into a staging folder: which files, how large they may be, and when to stop.

Only the files that the loader reads are asked for. Each size that the remote end declares is checked before a byte is
read, and what really comes is counted as well. Runs in a worker thread. Knows neither protocols nor names of hosts.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapters import own_tokenizer
from adapters.adapter_folder import INDEX_NAMES, MLX_WEIGHTS_NAME, WEIGHTS_NAME, AdapterFolder
from adapters.errors import AdapterNotFound
from adapters.lora_config import CONFIG_NAME, MAX_CONFIG_BYTES
from adapters.shard_index import MAX_INDEX_BYTES, shard_names
from server.lifecycle.sources.disk import Disk, NewFile
from server.lifecycle.sources.errors import AdapterSourceUnreachable, too_large

CHUNK_BYTES = 1 << 20
SMALL_FILES_BYTES = MAX_CONFIG_BYTES + MAX_INDEX_BYTES + len(own_tokenizer.NAMES) * own_tokenizer.MAX_BYTES
"""What may come beside the weights."""


class FetchStopped(Exception):
    """Whoever wanted the adapter does not any more; never seen outside of this package."""


class Transfer:
    """How far one fetch is and how far it may go. `stop` is called from any thread, the rest from the one that fetches.

    `report` gets (bytes so far, bytes in all or None while some size is unknown).
    """

    def __init__(self, *, max_bytes: int, max_seconds: float, report: Callable[[int, int | None], None]) -> None:
        self.max_bytes = max_bytes  # of the weights
        self._report = report
        self._stopped = threading.Event()
        self._max_seconds = max_seconds
        self._began = time.monotonic()
        self._done = 0
        self._total: int | None = 0

    def stop(self) -> None:
        self._stopped.set()

    def expect(self, num_bytes: int | None) -> None:
        """A file of that size, None if it is not said, comes next."""
        self._total = None if num_bytes is None or self._total is None else self._total + num_bytes
        self.advance(0)

    def advance(self, num_bytes: int) -> None:
        """So many more have come. Raises FetchStopped, AdapterRefused, AdapterSourceUnreachable."""
        if self._stopped.is_set():
            raise FetchStopped
        self._done += num_bytes
        if self._done > self.max_bytes + SMALL_FILES_BYTES:
            raise too_large("the adapter", None, self.max_bytes, "max_adapter_bytes")
        if time.monotonic() - self._began > self._max_seconds:
            raise AdapterSourceUnreachable(f"the adapter did not come within {self._max_seconds:g} s")
        self._report(self._done, self._total)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    num_bytes: int | None
    """As the remote end declares it."""
    chunks: Iterator[bytes]


class RemoteFolder(Protocol):
    def open(self, name: str) -> AbstractContextManager[RemoteFile]:
        """Raises AdapterNotFound when there is no such file or it may not be read, AdapterSourceUnreachable."""


def download_adapter(remote: RemoteFolder, into: Path, transfer: Transfer, disk: Disk) -> None:
    """Config, weights in one file or as index and shards, and a tokenizer if there is one. Raises AdapterError; then
    `into` holds a part of it.
    """
    _download(remote, CONFIG_NAME, into, transfer, disk, ("max_config_bytes", MAX_CONFIG_BYTES))
    weights_limit = ("max_adapter_bytes", transfer.max_bytes)
    try:
        _download(remote, WEIGHTS_NAME, into, transfer, disk, weights_limit)
    except AdapterNotFound:
        if _has_one(remote, INDEX_NAMES, into, transfer, disk, ("max_index_bytes", MAX_INDEX_BYTES)):
            with AdapterFolder.find(into) as folder:
                shards = shard_names(folder)
            for name in shards:
                _download(remote, name, into, transfer, disk, weights_limit)
        elif not _has_one(remote, [MLX_WEIGHTS_NAME], into, transfer, disk, weights_limit):
            raise
    for name in own_tokenizer.NAMES:
        _has_one(remote, [name], into, transfer, disk, ("max_tokenizer_bytes", own_tokenizer.MAX_BYTES))


def _has_one(
    remote: RemoteFolder, names: Iterable[str], into: Path, transfer: Transfer, disk: Disk, limit: tuple[str, int]
) -> bool:
    """Whether the first of these files that is there has come."""
    for name in names:
        try:
            _download(remote, name, into, transfer, disk, limit)
        except AdapterNotFound:
            continue
        return True
    return False


def _download(
    remote: RemoteFolder, name: str, into: Path, transfer: Transfer, disk: Disk, limit: tuple[str, int]
) -> None:
    flag, max_bytes = limit
    with remote.open(name) as file:
        if file.num_bytes is not None and file.num_bytes > max_bytes:
            raise too_large(name, file.num_bytes, max_bytes, flag)
        transfer.expect(file.num_bytes)
        with closing(NewFile(disk, into / name)) as copy:
            for chunk in file.chunks:
                transfer.advance(len(chunk))
                if copy.num_bytes + len(chunk) > max_bytes:
                    raise too_large(name, None, max_bytes, flag)
                copy.write(chunk)
        if file.num_bytes is not None and copy.num_bytes != file.num_bytes:
            raise AdapterSourceUnreachable(f"{name} broke off after {copy.num_bytes} of {file.num_bytes} bytes")
