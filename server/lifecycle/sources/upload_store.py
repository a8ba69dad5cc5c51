"""Adapters that were uploaded, each in a folder named after the SHA-256 of its content, under one quota.

An upload is written aside, flushed to the disk and only then given its name, so that what has a name is whole; the
same content sent twice is kept once. Writing runs in worker threads, the counts are the event loop's. Knows nothing of
HTTP beyond the body, nor of who uses an upload; whoever does must say when it may be removed.
"""

import asyncio
import errno
import hashlib
import os
import re
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from adapters import own_tokenizer
from adapters.adapter_folder import INDEX_NAMES, TOKENIZER_FILES, AdapterFolder
from adapters.errors import AdapterNotFound
from adapters.lora_config import CONFIG_NAME, MAX_CONFIG_BYTES
from adapters.sent_files import FilesNotWhole, check_weights, check_whole, is_weights
from adapters.shard_index import MAX_INDEX_BYTES
from server.lifecycle.sources.disk import Disk, NewFile, remove_tree, storage_errors
from server.lifecycle.sources.errors import AdapterStorageFull, AdapterUploadInvalid, too_large
from server.lifecycle.sources.in_thread import in_thread
from server.lifecycle.sources.multipart_upload import FRAME_BYTES, MultipartUpload
from server.lifecycle.sources.staging import Staging
from server.lifecycle.sources.upload_quota import QuotaShare, UploadQuota

_BATCH_BYTES = 1 << 20  # written at once: a hop to a worker thread for each piece a socket gives would cost more
_ID = re.compile(r"[0-9a-f]{64}")
_SMALL_FILES = {
    CONFIG_NAME: ("max_config_bytes", MAX_CONFIG_BYTES),
    **dict.fromkeys(INDEX_NAMES, ("max_index_bytes", MAX_INDEX_BYTES)),
    **dict.fromkeys(TOKENIZER_FILES, ("max_tokenizer_bytes", own_tokenizer.MAX_BYTES)),
}
_SMALL_FILES_BYTES = sum(limit for _, limit in _SMALL_FILES.values())


@dataclass(frozen=True, slots=True)
class Upload:
    upload_id: str
    num_bytes: int
    is_new: bool  # False: the same content was here already

    @property
    def source(self) -> str:
        return f"upload:{self.upload_id}"


class UploadStore:
    """`max_bytes` of weights in one upload, `quota` bytes in all. Made before the event loop runs, or in a thread.

    Raises AdapterStorageFull and AdapterStorageFailed, as its methods do.
    """

    def __init__(self, folder: Path, *, quota: int, max_bytes: int, disk: Disk | None = None) -> None:
        self._folder = folder
        self._quota = UploadQuota(quota, self._kept_bytes)
        self._max_bytes = max_bytes
        self._disk = disk or Disk()
        self._staging = Staging(folder / "incoming", disk=self._disk)
        self._naming = threading.Lock()  # held while an upload gets its name or loses it, and while those are counted

    async def receive(self, content_type: str, body: AsyncIterator[bytes]) -> Upload:
        """Take one multipart body to its end. Raises AdapterUploadInvalid, AdapterRefused (adapter_too_large),
        AdapterStorageFull, AdapterStorageFailed, and what `body` raises; then nothing of it is kept.
        """
        await asyncio.to_thread(self._recount)
        incoming = await in_thread(
            lambda: _Incoming(self._staging, self._disk, content_type, self._max_bytes), discard=_Incoming.remove
        )
        share, held = QuotaShare(self._quota), 0
        try:
            async for batch in _batches(body):
                held += len(batch)
                if held > self._max_bytes + _SMALL_FILES_BYTES + FRAME_BYTES:
                    raise too_large("the upload", None, self._max_bytes, "max_adapter_bytes")
                await self._take(share, len(batch))
                await in_thread(lambda data=batch: incoming.feed(data), wait_if_cancelled=True)  # type: ignore[misc]
            return await in_thread(lambda: self._keep(incoming, share), wait_if_cancelled=True)
        finally:
            await in_thread(lambda: _end(incoming, share), wait_if_cancelled=True)

    async def _take(self, share: QuotaShare, num_bytes: int) -> None:
        """Counts again before it refuses: uploads may have been removed meanwhile."""
        if not share.take(num_bytes):
            await asyncio.to_thread(self._recount)
            if not share.take(num_bytes):
                raise self._full()

    def _keep(self, incoming: "_Incoming", share: QuotaShare) -> Upload:
        """Blocks. Counts once more, since another process may have kept something meanwhile."""
        upload_id, num_bytes = incoming.finish()
        with self._naming:
            self._quota.recount()
            if self._quota.is_passed and not (self._folder / upload_id).is_dir():
                raise self._full()
            is_new = incoming.give_name(self._folder, upload_id)
            if is_new:
                share.give_back(kept=num_bytes)
        return Upload(upload_id, num_bytes, is_new)

    def _recount(self) -> None:
        with self._naming:
            self._quota.recount()

    def _full(self) -> AdapterStorageFull:
        return AdapterStorageFull(f"uploads would take more than the {self._quota.num_bytes} bytes of --upload-quota")

    def open(self, upload_id: str) -> AdapterFolder:
        """Blocks. Raises AdapterNotFound, AdapterRefused."""
        path = self._folder / upload_id
        if not _ID.fullmatch(upload_id) or not path.is_dir():
            raise AdapterNotFound(f"there is no upload {upload_id[:64]} on this server; send it again")
        return AdapterFolder.find(path)

    def remove(self, upload_id: str, *, received: int | None = None) -> None:
        """Blocks. Who reads it at this moment goes on reading; what is not there is removed already. With `received`
        (as `received` says it) only if it was not received again since.
        """
        if not _ID.fullmatch(upload_id):
            return
        with self._naming:
            if received is None or received == _received(self._folder / upload_id):
                remove_tree(self._folder / upload_id)

    def ids(self) -> frozenset[str]:
        """Blocks."""
        with storage_errors():
            return frozenset(path.name for path in self._folder.iterdir() if _ID.fullmatch(path.name))

    def received(self) -> Mapping[str, int]:
        """Id → when it was last received, as a mark that changes when it is received again. Blocks."""
        with storage_errors():
            marks = {upload_id: _received(self._folder / upload_id) for upload_id in self.ids()}
        return {upload_id: mark for upload_id, mark in marks.items() if mark is not None}

    @property
    def num_bytes(self) -> int:
        """Of all uploads. Blocks."""
        return self._kept_bytes()

    def _kept_bytes(self) -> int:
        with storage_errors():
            return sum(_folder_bytes(self._folder / upload_id) for upload_id in self.ids())

    def close(self) -> None:
        """Removes what is not whole."""
        self._staging.close()


class _Incoming:
    """One upload being written; used by one thread at a time."""

    def __init__(self, staging: Staging, disk: Disk, content_type: str, max_bytes: int) -> None:
        self._disk = disk
        self._max_bytes = max_bytes  # of all weights together
        self._weight_bytes = 0
        self._upload = MultipartUpload(content_type, self._keep_bytes)
        self._files: dict[str, NewFile] = {}
        self._digests: dict[str, hashlib._Hash] = {}
        self._path = staging.new_folder()

    def feed(self, data: bytes) -> None:
        self._upload.feed(data)

    def _keep_bytes(self, name: str, data: memoryview) -> None:
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = NewFile(self._disk, self._path / name)
            self._digests[name] = hashlib.sha256()
        self._check_size(name, file.num_bytes + len(data), len(data))
        file.write(data)
        self._digests[name].update(data)

    def _check_size(self, name: str, num_bytes: int, more: int) -> None:
        if is_weights(name):
            self._weight_bytes += more
            if self._weight_bytes > self._max_bytes:
                what = name if num_bytes == self._weight_bytes else f"the weights up to {name}"
                raise too_large(what, None, self._max_bytes, "max_adapter_bytes")
        else:
            flag, limit = _SMALL_FILES[name]
            if num_bytes > limit:
                raise too_large(name, None, limit, flag)

    def finish(self) -> tuple[str, int]:
        """(id, bytes), once it is whole and on the disk."""
        self._upload.finish()
        self._check_whole()
        for file in self._files.values():
            file.sync()
        num_bytes = sum(file.num_bytes for file in self._files.values())
        digest = hashlib.sha256()
        for name, each in sorted(self._digests.items()):
            digest.update(hashlib.sha256(name.encode()).digest() + each.digest())
        return digest.hexdigest(), num_bytes

    def _check_whole(self) -> None:
        """Raises AdapterUploadInvalid, AdapterRefused."""
        try:
            check_whole(self._files)
            with AdapterFolder.find(self._path) as folder:
                check_weights(folder, self._files)
        except FilesNotWhole as error:
            raise AdapterUploadInvalid(str(error)) from None

    def give_name(self, folder: Path, upload_id: str) -> bool:
        """False: it was there already, and counts as received now. One at a time, so that nobody counts on one that is
        taken back.
        """
        final = folder / upload_id
        if final.is_dir() and self._is_touched(final):
            return False
        with storage_errors(), ExitStack() as undo:
            self._disk.sync_folder(self._path)
            try:
                self._disk.rename(self._path, final)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                    return False
                raise
            undo.callback(remove_tree, final)
            self._disk.sync_folder(folder)
            undo.pop_all()
        return True

    def _is_touched(self, final: Path) -> bool:
        """False: another process removed it meanwhile."""
        with storage_errors():
            try:
                self._disk.touch(final)
            except FileNotFoundError:
                return False
        return True

    def remove(self) -> None:
        """What was not kept. Must be called in the end."""
        for file in self._files.values():
            file.close()
        self._files = {}
        remove_tree(self._path)


def _end(incoming: _Incoming, share: QuotaShare) -> None:
    """Its bytes count until they are gone."""
    try:
        incoming.remove()
    finally:
        share.give_back()


async def _batches(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    batch = bytearray()
    async for data in body:
        batch += data
        if len(batch) >= _BATCH_BYTES:
            yield bytes(batch)
            batch.clear()
    if batch:
        yield bytes(batch)


def _received(path: Path) -> int | None:
    """None: it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _folder_bytes(path: Path) -> int:
    try:
        with os.scandir(path) as entries:
            return sum(_size(entry) for entry in entries)
    except FileNotFoundError:  # removed meanwhile
        return 0


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
