"""Uploads: one multipart body in pieces of any size, the files and no others, quotas, broken disks and clients."""

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.errors import AdapterError, AdapterNotFound, AdapterRefused, RefusalCode
from adapters.lora_config import CONFIG_NAME, MAX_CONFIG_BYTES
from server.lifecycle.sources import upload_store
from server.lifecycle.sources.errors import (
    AdapterSourceUnsupported,
    AdapterStorageFailed,
    AdapterStorageFull,
    AdapterUploadInvalid,
)
from server.lifecycle.sources.sources import SourceLimits, Sources
from server.lifecycle.sources.upload_store import Upload, UploadStore
from tests.adapters.hostile import WEIGHTS, healthy
from tests.server.fakes import TINY_BASE
from tests.server.lifecycle.failing_disk import FailingDisk

MAX_BYTES = 1 << 20
TYPE = "multipart/form-data; boundary=--x"
LIMITS = CheckpointLimits(max_lora_rank=16, max_adapter_bytes=MAX_BYTES)


def part(name: str, data: bytes, *, headers: str | None = None) -> bytes:
    shown = headers or f'Content-Disposition: form-data; name="files"; filename="{name}"\r\n'
    return b"----x\r\n" + shown.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + data + b"\r\n"


def body_of(*parts: bytes) -> bytes:
    return b"".join(parts) + b"----x--\r\n"


async def pieces(body: bytes, size: int = 65536) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]
        await asyncio.sleep(0)


@dataclass
class World:
    folder: Path
    store: UploadStore
    config: bytes
    weights: bytes

    @property
    def body(self) -> bytes:
        return body_of(part(CONFIG_NAME, self.config), part(WEIGHTS, self.weights))

    async def send(self, body: bytes | None = None, size: int = 65536, content_type: str = TYPE) -> Upload:
        return await self.store.receive(content_type, pieces(self.body if body is None else body, size))

    def left(self) -> set[str]:
        """All below the store but whole uploads and the empty folder of this process."""
        return {str(path.relative_to(self.folder)) for path in self.folder.glob("incoming/*/*")}

    def check_empty(self) -> None:
        assert self.left() == set()
        assert self.store.ids() == frozenset()
        assert self.store.num_bytes == 0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    adapter = healthy(tmp_path / "adapter", TINY_BASE)
    config, weights = (adapter / CONFIG_NAME).read_bytes(), (adapter / WEIGHTS).read_bytes()
    store = UploadStore(tmp_path / "uploads", quota=4 * MAX_BYTES, max_bytes=MAX_BYTES)
    world = World(tmp_path / "uploads", store, config, weights)
    yield world
    assert world.left() == set()
    store.close()
    assert list((tmp_path / "uploads" / "incoming").iterdir()) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 20])
async def test_an_upload_in_pieces_of_any_size_is_a_source(world: World, size: int, tmp_path: Path) -> None:
    upload = await world.send(size=size)
    assert upload.is_new and upload.num_bytes == len(world.config) + len(world.weights) == world.store.num_bytes
    kept = world.folder / upload.upload_id
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert (kept / CONFIG_NAME).read_bytes() == world.config
    assert (kept / WEIGHTS).read_bytes() == world.weights
    limits = SourceLimits(max_bytes=MAX_BYTES)
    sources = Sources(roots=[tmp_path / "none"], staging=tmp_path / "s", limits=limits, uploads=world.store)
    wanted = load_lora_model(tmp_path / "adapter", TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version
    async with sources.fetched(upload.source) as folder:
        world.store.remove(upload.upload_id)  # while it is being read
        assert folder.path == kept
        names = {entry.name for entry in kept.parent.iterdir()}
        assert names == {"incoming"}
    upload = await world.send(size=size)
    async with sources.fetched(upload.source) as folder:
        assert load_lora_model(folder, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version == wanted
    assert upload.source in sources_of(world)
    sources.close()


def sources_of(world: World) -> set[str]:
    return {f"upload:{upload_id}" for upload_id in world.store.ids()}


@pytest.mark.asyncio
async def test_the_same_content_is_kept_once(world: World) -> None:
    first = await world.send()
    swapped = body_of(part(WEIGHTS, world.weights), part(CONFIG_NAME, world.config))
    again = await asyncio.gather(*(world.send(body) for body in (world.body, swapped) * 3))
    assert {upload.upload_id for upload in again} == {first.upload_id}
    assert not any(upload.is_new for upload in again)
    assert world.store.num_bytes == first.num_bytes
    other = await world.send(body_of(part(CONFIG_NAME, world.config + b" "), part(WEIGHTS, world.weights)))
    moved = await world.send(
        body_of(part(CONFIG_NAME, world.config[:-1]), part(WEIGHTS, world.config[-1:] + world.weights))
    )
    assert len({first.upload_id, other.upload_id, moved.upload_id}) == 3


@pytest.mark.asyncio
async def test_racing_uploads_of_the_same_content(world: World) -> None:
    uploads = await asyncio.gather(*(world.send(size=100 + number) for number in range(8)))
    assert len({upload.upload_id for upload in uploads}) == 1
    assert sum(upload.is_new for upload in uploads) == 1


@pytest.mark.asyncio
async def test_field_names_will_do_where_there_is_no_file_name(world: World) -> None:
    named = [
        part(name, data, headers=f'content-disposition: FORM-DATA; name="{name}"\r\n')
        for name, data in ((CONFIG_NAME, world.config), (WEIGHTS, world.weights))
    ]
    assert (await world.send(body_of(*named))).upload_id == (await world.send()).upload_id


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../adapter_config.json", "/etc/passwd", "a/adapter_config.json", "C:\\\\adapter_config.json",
        "adapter_config.json\\0", "adapter_config.json ", "ADAPTER_CONFIG.JSON", "adapter_model.bin",
        "adapter_model.pt",
        "model.safetensors", "README.md", "tokenizer.py", "adapter_config.json\\n", "special_tokens_map.json",
        "x" * 3000,
        "ａdapter_config.json", "adapter_config.json\x00.txt", "%61dapter_config.json",
    ],
)  # fmt: skip
async def test_other_files_are_refused_by_their_name(world: World, name: str) -> None:
    with pytest.raises(AdapterUploadInvalid):
        await world.send(body_of(part(CONFIG_NAME, world.config), part(name, b"x"), part(WEIGHTS, world.weights)))
    world.check_empty()


def _bodies(world: World) -> dict[str, bytes]:
    config, weights = part(CONFIG_NAME, world.config), part(WEIGHTS, world.weights)
    disposition = f'Content-Disposition: form-data; name="f"; filename="{CONFIG_NAME}"\r\n'
    return {
        "empty": b"",
        "no part": b"----x--\r\n",
        "no weights": body_of(config),
        "no config": body_of(weights),
        "twice": body_of(config, config, weights),
        "cut off within a file": world.body[:-2000],
        "cut off before the last boundary": config + weights,
        "cut off within the last boundary": world.body[:-5],
        "cut off within a header": world.body[:40],
        "garbage": b"\x00\xff" * 1000,
        "json": b'{"a": 1}',
        "another boundary": world.body.replace(b"----x", b"----y"),
        "no disposition": body_of(part("", b"x", headers="X: y\r\n"), config, weights),
        "base64": body_of(
            part("", world.config, headers=disposition + "Content-Transfer-Encoding: base64\r\n"), weights
        ),
        "long header": body_of(part("", b"", headers=disposition + "X: " + "y" * 9000 + "\r\n"), weights),
        "many headers": body_of(part("", b"", headers=disposition + "X: y\r\n" * 5000), weights),
        "header that is not UTF-8": world.body.replace(b"application/octet-stream", b"\xff\xfe"),
        "header without a colon": world.body.replace(b"Content-Type:", b"Content-Type"),
    }


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [3, 65536])
@pytest.mark.parametrize(
    "case",
    [
        "empty", "no part", "no weights", "no config", "twice", "cut off within a file",
        "cut off before the last boundary",
        "cut off within the last boundary", "cut off within a header", "garbage", "json", "another boundary",
        "no disposition",
        "base64", "long header", "many headers", "header that is not UTF-8", "header without a colon",
    ],
)  # fmt: skip
async def test_bodies_that_are_no_upload_leave_nothing(world: World, case: str, size: int) -> None:
    with pytest.raises(AdapterUploadInvalid) as caught:
        await world.send(_bodies(world)[case], size)
    assert caught.value.status == 400
    world.check_empty()


@pytest.mark.asyncio
async def test_an_upload_cut_at_any_byte_leaves_nothing(world: World) -> None:
    small = body_of(part(CONFIG_NAME, b"{}"), part(WEIGHTS, b"weights"))
    for length in range(len(small) - 4):  # "--\r\n" are the last
        with pytest.raises(AdapterUploadInvalid):
            await world.send(small[:length])
    world.check_empty()
    await world.send(small)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "content_type",
    [
        "", "application/json", "multipart/form-data", "multipart/mixed; boundary=--x",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 71, "multipart/form-data; boundary*=--x",
        "application/octet-stream; boundary=--x",
    ],
)  # fmt: skip
async def test_content_types_that_are_no_upload(world: World, content_type: str) -> None:
    with pytest.raises(AdapterUploadInvalid):
        await world.send(content_type=content_type)
    world.check_empty()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("config", "weights"),
    [(MAX_CONFIG_BYTES + 1, 10), (10, MAX_BYTES + 1), (10, 50 * MAX_BYTES)],
)
async def test_what_is_too_large_is_refused_while_it_comes(world: World, config: int, weights: int) -> None:
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        async for piece in pieces(body_of(part(CONFIG_NAME, b"x" * config), part(WEIGHTS, b"x" * weights))):
            taken += len(piece)
            yield piece

    with pytest.raises(AdapterRefused) as caught:
        await world.store.receive(TYPE, body())
    assert caught.value.reason is RefusalCode.TOO_LARGE
    assert taken < 4 * MAX_BYTES
    world.check_empty()


@pytest.mark.asyncio
async def test_at_the_limit_it_is_kept(world: World) -> None:
    exact = body_of(part(CONFIG_NAME, b"x" * MAX_CONFIG_BYTES), part(WEIGHTS, b"x" * MAX_BYTES))
    assert (await world.send(exact)).num_bytes == MAX_CONFIG_BYTES + MAX_BYTES


@pytest.mark.asyncio
async def test_the_quota_is_of_all_uploads_also_of_those_under_way(tmp_path: Path) -> None:
    store = UploadStore(tmp_path / "u", quota=3000, max_bytes=MAX_BYTES)

    def body(fill: bytes) -> bytes:
        return body_of(part(CONFIG_NAME, b"{}"), part(WEIGHTS, fill * 1000))

    first = await store.receive(TYPE, pieces(body(b"a"), 100))
    outcomes = await asyncio.gather(
        *(store.receive(TYPE, pieces(body(fill), 100)) for fill in (b"b", b"c")), return_exceptions=True
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AdapterStorageFull", "Upload"]
    full = next(outcome for outcome in outcomes if isinstance(outcome, AdapterStorageFull))
    assert full.status == 507 and "--upload-quota" in str(full)
    with pytest.raises(AdapterStorageFull):
        await store.receive(TYPE, pieces(body(b"d")))
    store.remove(first.upload_id)
    assert (await store.receive(TYPE, pieces(body(b"d")))).is_new
    again = UploadStore(tmp_path / "u", quota=3000, max_bytes=MAX_BYTES)  # counts what it finds
    with pytest.raises(AdapterStorageFull):
        await again.receive(TYPE, pieces(body(b"e")))
    for each in (store, again):
        each.close()


def of_size(size: int, fill: bytes) -> bytes:
    return body_of(part(CONFIG_NAME, b"{}"), part(WEIGHTS, fill * size))


@dataclass
class Halves:
    """An upload whose second half comes when it is told."""

    store: UploadStore
    body: bytes

    def __post_init__(self) -> None:
        self.go_on, self.has_begun = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self.store.receive(TYPE, self._pieces()))

    async def _pieces(self) -> AsyncIterator[bytes]:
        self.has_begun.set()
        yield self.body[: len(self.body) // 2]
        await self.go_on.wait()
        yield self.body[len(self.body) // 2 :]

    async def end(self) -> object:
        self.go_on.set()
        return (await asyncio.gather(self.task, return_exceptions=True))[0]


async def begun(store: UploadStore, *bodies: bytes) -> list[Halves]:
    halves = [Halves(store, body) for body in bodies]
    for each in halves:
        await each.has_begun.wait()
    return halves


@pytest.mark.asyncio
async def test_an_upload_counts_those_that_ended_since_it_began(tmp_path: Path) -> None:
    store = UploadStore(tmp_path / "u", quota=10_000, max_bytes=MAX_BYTES)
    for each in await begun(store, *(of_size(4000, fill) for fill in (b"a", b"b", b"c", b"d"))):
        await each.end()
    assert store.num_bytes == 2 * 4002
    assert isinstance(await (await begun(store, of_size(4000, b"a")))[0].end(), AdapterStorageFull)
    for upload_id in store.ids():
        store.remove(upload_id)
    assert isinstance(await (await begun(store, of_size(4000, b"e")))[0].end(), Upload)
    store.close()


@pytest.mark.asyncio
async def test_what_was_removed_since_an_upload_began_is_free_to_it(tmp_path: Path) -> None:
    store = UploadStore(tmp_path / "u", quota=6000, max_bytes=MAX_BYTES)
    first = await store.receive(TYPE, pieces(of_size(4000, b"a")))
    (second,) = await begun(store, of_size(4000, b"b"))
    store.remove(first.upload_id)
    assert isinstance(await second.end(), Upload)
    store.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(("fill", "ending"), [(b"a", AdapterStorageFull), (b"b", Upload)])
async def test_an_upload_counts_what_another_process_kept_since_it_began(
    tmp_path: Path, fill: bytes, ending: type[object]
) -> None:
    store, other = (UploadStore(tmp_path / "u", quota=6000, max_bytes=MAX_BYTES) for _ in range(2))
    (late,) = await begun(store, of_size(4000, fill))
    await other.receive(TYPE, pieces(of_size(4000, b"b")))
    assert isinstance(await late.end(), ending)
    assert store.num_bytes == 4002
    for each in (store, other):
        each.close()


@pytest.mark.asyncio
async def test_the_quota_is_not_counted_from_the_disk_with_each_batch(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_store, "_BATCH_BYTES", 100)
    counts, count = [0], UploadStore.ids

    def counted(store: UploadStore) -> frozenset[str]:
        counts[0] += 1
        return count(store)

    monkeypatch.setattr(UploadStore, "ids", counted)
    await world.send(size=100)
    assert counts[0] <= 3 < len(world.body) / 100


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, AdapterStorageFull), (errno.EDQUOT, AdapterStorageFull), (errno.EIO, AdapterStorageFailed)],
)
async def test_the_disk_fails_at_each_of_its_calls(tmp_path: Path, number: int, kind: type[AdapterError]) -> None:
    disk = FailingDisk(number, max_write=700)
    folder = tmp_path / "u"
    store = UploadStore(folder, quota=MAX_BYTES, max_bytes=MAX_BYTES, disk=disk)
    body = body_of(part(CONFIG_NAME, b"{}"), part(WEIGHTS, b"x" * 2000))
    failures = 0
    while True:
        disk.fail_at(failures)
        try:
            upload = await store.receive(TYPE, pieces(body, 512))
        except kind as error:
            assert error.status == (507 if kind is AdapterStorageFull else 500)
            assert list(folder.glob("incoming/*/*")) == [] and store.ids() == frozenset()
            failures += 1
            continue
        assert not disk.has_failed
        break
    assert failures >= 11, "a folder, two files, four writes, two flushes, the folder's, the rename, the parent's"
    assert (folder / upload.upload_id / WEIGHTS).read_bytes() == b"x" * 2000
    store.close()


@pytest.mark.asyncio
async def test_everything_is_flushed_before_it_has_a_name(tmp_path: Path) -> None:
    calls: list[str] = []

    class Recording(FailingDisk):
        def sync(self, descriptor: int) -> None:
            calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
            super().sync(descriptor)

        def rename(self, old: Path, new: Path) -> None:
            calls.append("rename")
            super().rename(old, new)

    store = UploadStore(tmp_path / "u", quota=MAX_BYTES, max_bytes=MAX_BYTES, disk=Recording(0))
    await store.receive(TYPE, pieces(body_of(part(CONFIG_NAME, b"{}"), part(WEIGHTS, b"x"))))
    renamed = calls.index("rename")
    assert {f"sync {CONFIG_NAME}", f"sync {WEIGHTS}"} < set(calls[:renamed])
    assert len(calls[:renamed]) == 3, "the two files and their folder"
    assert calls[renamed + 1 :] == ["sync u"]
    store.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("end", [lambda: ConnectionResetError("gone"), lambda: asyncio.CancelledError()])
async def test_a_client_that_leaves_leaves_nothing(world: World, end: Callable[[], BaseException]) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield world.body[: len(world.body) // 2]
        raise end()

    with pytest.raises(type(end())):
        await world.store.receive(TYPE, body())
    world.check_empty()


@pytest.mark.asyncio
async def test_uploads_cancelled_at_any_moment_leave_all_or_nothing(world: World) -> None:
    kept = 0
    for number in range(60):
        task = asyncio.create_task(world.send(size=5000))
        await asyncio.sleep(number * 0.0004)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while world.left():  # cancelled while its folder was made: that is removed a moment later
            await asyncio.sleep(0.001)
        for upload_id in world.store.ids():
            kept += 1
            with world.store.open(upload_id) as folder:
                load_lora_model(folder, TINY_BASE, limits=LIMITS, dtype=torch.float32)
            world.store.remove(upload_id)
    world.check_empty()


@pytest.mark.asyncio
async def test_what_is_not_there(world: World, tmp_path: Path) -> None:
    limits = SourceLimits(max_bytes=MAX_BYTES)
    sources = Sources(staging=tmp_path / "s", limits=limits, uploads=world.store)
    with pytest.raises(AdapterNotFound, match="send it again"):
        async with sources.fetched("upload:" + "0" * 64):
            pass
    world.store.remove("0" * 64)
    for hostile in ("incoming", "..", "", "../adapter"):
        world.store.remove(hostile)
        with pytest.raises(AdapterNotFound):
            world.store.open(hostile)
    assert (world.folder / "incoming").is_dir() and (tmp_path / "adapter").is_dir()
    sources.close()
    without = Sources(staging=tmp_path / "s", limits=limits)
    with pytest.raises(AdapterSourceUnsupported, match="--upload-quota"):
        without.check("upload:" + "0" * 64)
    without.close()
