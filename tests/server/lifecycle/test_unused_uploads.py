"""The sweep of uploads that nothing was loaded from: what it removes, and what has come in just now."""

import asyncio
import errno
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.lora_config import CONFIG_NAME
from server.lifecycle.sources.errors import AdapterStorageFailed
from server.lifecycle.sources.upload_store import Upload, UploadStore
from server.lifecycle.unused_uploads import sweep_once
from tests.adapters.hostile import WEIGHTS
from tests.server.lifecycle.failing_disk import FailingDisk
from tests.server.lifecycle.test_sources_uploads import MAX_BYTES, TYPE, body_of, part, pieces

pytestmark = pytest.mark.asyncio


@pytest.fixture
def store(tmp_path: Path) -> Iterator[UploadStore]:
    store = UploadStore(tmp_path / "uploads", quota=MAX_BYTES, max_bytes=MAX_BYTES)
    yield store
    store.close()


async def _sent(store: UploadStore, weights: bytes = b"a") -> Upload:
    return await store.receive(TYPE, pieces(body_of(part(CONFIG_NAME, b"{}"), part(WEIGHTS, weights))))


def _nothing() -> frozenset[str]:
    return frozenset()


async def test_what_was_unused_twice_goes(store: UploadStore) -> None:
    used, gone = await _sent(store, b"a"), await _sent(store, b"b")
    unused = await sweep_once(store, lambda: {used.source}, frozenset())
    assert store.ids() == {used.upload_id, gone.upload_id}
    await sweep_once(store, lambda: {used.source}, unused)
    assert store.ids() == {used.upload_id}


async def test_what_was_used_in_between_stays(store: UploadStore) -> None:
    upload = await _sent(store)
    unused = await sweep_once(store, _nothing, frozenset())
    unused = await sweep_once(store, lambda: {upload.source}, unused)
    await sweep_once(store, _nothing, unused)
    assert store.ids() == {upload.upload_id}


async def test_what_is_received_again_is_as_new(store: UploadStore) -> None:
    """Its load has not begun yet."""
    first = await _sent(store)
    unused = await sweep_once(store, _nothing, frozenset())
    again = await _sent(store)
    assert again.upload_id == first.upload_id and not again.is_new
    unused = await sweep_once(store, _nothing, unused)
    assert store.ids() == {first.upload_id}
    await sweep_once(store, _nothing, unused)
    assert store.ids() == frozenset()


async def test_what_is_received_again_while_it_is_swept_stays(store: UploadStore) -> None:
    """After the sweep has looked at the folder, before it removes anything."""
    upload = await _sent(store)
    unused = await sweep_once(store, _nothing, frozenset())

    def used_meanwhile() -> frozenset[str]:
        with ThreadPoolExecutor(1) as thread:
            assert not thread.submit(asyncio.run, _sent(store)).result().is_new
        return frozenset()

    await sweep_once(store, used_meanwhile, unused)
    assert store.ids() == {upload.upload_id}


async def test_what_cannot_be_renewed_is_not_promised(tmp_path: Path) -> None:
    disk = FailingDisk(errno.EIO)
    store = UploadStore(tmp_path / "uploads", quota=MAX_BYTES, max_bytes=MAX_BYTES, disk=disk)
    await _sent(store)
    calls = 0
    while True:
        disk.fail_at(calls)
        try:
            assert not (await _sent(store)).is_new
        except AdapterStorageFailed:
            calls += 1
            continue
        break
    assert calls == 8, "a folder, two files made, written and flushed, the time of the one that is there"
    store.close()
