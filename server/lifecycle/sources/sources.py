"""A source string → an adapter's folder, open for reading: a local folder in place, an upload, or a download.

Downloads go to a private staging folder and are gone when the context ends, or when a fetch fails or is cancelled.
Lives on the event loop; everything that blocks runs in worker threads, downloads in a few of their own, so that slow
ones do not take those of others. Knows nothing of names of adapters and of what the folder holds.
"""

import importlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from adapters.adapter_folder import AdapterFolder
from server.lifecycle.sources.address import (
    HubAddress,
    LocalAddress,
    RemoteAddress,
    UploadAddress,
    parse_source,
    without_secrets,
)
from server.lifecycle.sources.allow_list import DEFAULT_ALLOWED_URLS, AllowList
from server.lifecycle.sources.disk import Disk, remove_tree
from server.lifecycle.sources.download import RemoteFolder, Transfer, download_adapter
from server.lifecycle.sources.errors import AdapterSourceUnsupported
from server.lifecycle.sources.hub_folder import HubFolder
from server.lifecycle.sources.in_thread import in_thread
from server.lifecycle.sources.local_folders import LocalFolders
from server.lifecycle.sources.staging import Staging
from server.lifecycle.sources.thread_reports import Progress, ThreadReports
from server.lifecycle.sources.upload_store import UploadStore
from server.lifecycle.sources.web_folder import WebFolder

_MAX_FETCHES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLimits:
    max_bytes: int  # of an adapter's weights
    timeout: float = 20.0  # seconds a remote end may be silent
    max_seconds: float = 600.0  # a download may take


class Sources:
    """`roots` empty = any folder that the server can read; `hub_endpoint`, `hub_token` None = as the environment says.

    Made before the event loop runs or on it. Raises AdapterSourceInvalid for an allowed URL that is none,
    AdapterStorageFull and AdapterStorageFailed when `staging` cannot be made.
    """

    def __init__(
        self,
        *,
        roots: Sequence[Path] = (),
        allowed_urls: Sequence[str] = DEFAULT_ALLOWED_URLS,
        staging: Path,
        limits: SourceLimits,
        uploads: UploadStore | None = None,
        hub_endpoint: str | None = None,
        hub_token: str | None = None,
        disk: Disk | None = None,
    ) -> None:
        self._local = LocalFolders(roots)
        self._allow_list = AllowList(allowed_urls)
        self._disk = disk or Disk()
        self._limits = limits
        self._uploads = uploads
        self._hub_endpoint = hub_endpoint
        self._hub_token = hub_token
        self._staging = Staging(staging, disk=self._disk)
        self._fetchers = ThreadPoolExecutor(_MAX_FETCHES, thread_name_prefix="fetch")
        self._transfers: set[Transfer] = set()

    def check(self, source: str) -> None:
        """Whether the source may be fetched, by its text alone: neither it nor a network is looked at.

        Raises AdapterSourceInvalid, AdapterSourceUnsupported, AdapterSourceNotAllowed, AdapterNotFound.
        """
        address = parse_source(source)
        if isinstance(address, LocalAddress):
            self._local.check(address.path)
        elif isinstance(address, UploadAddress):
            self._upload_store()
        else:
            self._allow_list.require(address, source)
            if address_needs_obstore(address) and find_spec("obstore") is None:
                raise AdapterSourceUnsupported(
                    f"{without_secrets(source)!r} needs an extra on the server: pip install 'loramux[cloud]'"
                )

    @asynccontextmanager
    async def fetched(self, source: str, progress: Progress = lambda done, total: None) -> AsyncIterator[AdapterFolder]:
        """The folder, open while the context lasts. `progress` is told of bytes. Raises what `check` does,
        AdapterRefused, and of the rest of the tree AdapterSourceUnreachable, AdapterStorageFull, AdapterStorageFailed.
        """
        self.check(source)
        address = parse_source(source)
        if isinstance(address, LocalAddress):
            folder = await in_thread(partial(self._local.open, address.path), discard=AdapterFolder.close)
        elif isinstance(address, UploadAddress):
            folder = await in_thread(partial(self._upload_store().open, address.upload_id), discard=AdapterFolder.close)
        else:
            folder = await self._downloaded(address, progress)
        try:
            yield folder
        finally:
            is_copy = not isinstance(address, LocalAddress | UploadAddress)
            await in_thread(partial(_remove if is_copy else AdapterFolder.close, folder), wait_if_cancelled=True)

    def close(self) -> None:
        """Stops what is being fetched and removes it. Blocks while a remote end is silent, up to the timeout."""
        for transfer in self._transfers:
            transfer.stop()
        self._fetchers.shutdown(cancel_futures=True)
        self._staging.close()

    async def _downloaded(self, address: RemoteAddress, progress: Progress) -> AdapterFolder:
        with ThreadReports(progress) as reports:
            transfer = Transfer(
                max_bytes=self._limits.max_bytes, max_seconds=self._limits.max_seconds, report=reports.from_thread
            )
            self._transfers.add(transfer)
            try:
                return await in_thread(
                    partial(self._download, address, transfer),
                    executor=self._fetchers,
                    discard=_remove,
                    on_cancel=transfer.stop,
                )
            finally:
                self._transfers.discard(transfer)

    def _download(self, address: RemoteAddress, transfer: Transfer) -> AdapterFolder:
        transfer.advance(0)
        path = self._staging.new_folder()
        try:
            download_adapter(self._remote_folder(address), path, transfer, self._disk)
            return AdapterFolder.find(path)
        except BaseException:
            remove_tree(path)
            raise

    def _remote_folder(self, address: RemoteAddress) -> RemoteFolder:
        timeout, max_seconds = self._limits.timeout, self._limits.max_seconds
        if isinstance(address, HubAddress):
            return HubFolder(
                address, self._allow_list, endpoint=self._hub_endpoint, token=self._hub_token, timeout=timeout
            )
        if address_needs_obstore(address):
            cloud_folder = importlib.import_module("server.lifecycle.sources.cloud_folder")
            made = cloud_folder.CloudFolder(address, timeout=timeout, max_seconds=max_seconds)
            return cast(RemoteFolder, made)
        return WebFolder(address, self._allow_list, timeout=timeout, max_seconds=max_seconds)

    def _upload_store(self) -> UploadStore:
        if self._uploads is None:
            raise AdapterSourceUnsupported("this server keeps no uploads (--upload-quota)")
        return self._uploads


def address_needs_obstore(address: RemoteAddress) -> bool:
    return not isinstance(address, HubAddress) and address.scheme not in ("http", "https")


def _remove(folder: AdapterFolder) -> None:
    folder.close()
    remove_tree(folder.path)
