"""Which files make an upload: shards with either index, MLX's weights, a tokenizer, in any order; and what does not."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from adapters import own_tokenizer
from adapters.adapter_folder import INDEX_NAMES, MLX_WEIGHTS_NAME, TOKENIZER_FILES, WEIGHTS_NAME
from adapters.checkpoint import load_lora_model
from adapters.errors import AdapterRefused, RefusalCode
from adapters.lora_config import CONFIG_NAME
from adapters.shard_index import MAX_INDEX_BYTES, MAX_SHARDS
from server.lifecycle.sources.errors import AdapterStorageFull, AdapterUploadInvalid
from server.lifecycle.sources.upload_store import Upload, UploadStore
from tests.adapters.hostile import WEIGHTS, healthy
from tests.server.fakes import TINY_BASE
from tests.server.lifecycle.test_sources_uploads import LIMITS, MAX_BYTES, TYPE, pieces

QUOTA = 1 << 28
Files = dict[str, bytes]


def body_of(files: list[tuple[str, bytes]]) -> bytes:
    head = b'----x\r\nContent-Disposition: form-data; name="f"; filename="%b"\r\n\r\n%b\r\n'
    return b"".join(head % (name.encode(), data) for name, data in files) + b"----x--\r\n"


@dataclass
class World:
    store: UploadStore
    folder: Path
    adapter: Path

    @property
    def config(self) -> bytes:
        return (self.adapter / CONFIG_NAME).read_bytes()

    @property
    def whole(self) -> Files:
        return {CONFIG_NAME: self.config, WEIGHTS_NAME: (self.adapter / WEIGHTS).read_bytes()}

    def sharded(self, index_name: str = INDEX_NAMES[0], count: int = 3) -> Files:
        tensors = load_file(self.adapter / WEIGHTS)
        index = {name: f"part-{at % count}.safetensors" for at, name in enumerate(sorted(tensors))}
        shards = {
            file: save({name: tensor for name, tensor in tensors.items() if index[name] == file})
            for file in sorted(set(index.values()))
        }
        return {CONFIG_NAME: self.config, index_name: json.dumps({"weight_map": index}).encode(), **shards}

    async def send(self, files: Files | list[tuple[str, bytes]], size: int = 65536) -> Upload:
        parts = list(files.items()) if isinstance(files, dict) else files
        return await self.store.receive(TYPE, pieces(body_of(parts), size))

    def version(self, upload: Upload) -> str:
        with self.store.open(upload.upload_id) as folder:
            return load_lora_model(folder, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version

    def check_empty(self) -> None:
        assert list(self.folder.glob("incoming/*/*")) == []
        assert self.store.ids() == frozenset() and self.store.num_bytes == 0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    adapter = healthy(tmp_path / "adapter", TINY_BASE)
    store = UploadStore(tmp_path / "uploads", quota=QUOTA, max_bytes=MAX_BYTES)
    world = World(store, tmp_path / "uploads", adapter)
    yield world
    assert list(world.folder.glob("incoming/*/*")) == []
    store.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("index_name", INDEX_NAMES)
@pytest.mark.parametrize("size", [7, 65536])
async def test_shards_are_the_one_file(world: World, index_name: str, size: int) -> None:
    files = world.sharded(index_name)
    upload = await world.send(files, size)
    assert upload.num_bytes == sum(map(len, files.values())) == world.store.num_bytes
    kept = {path.name: path.read_bytes() for path in (world.folder / upload.upload_id).iterdir()}
    assert kept == files
    assert world.version(upload) == world.version(await world.send(world.whole))


@pytest.mark.asyncio
async def test_the_order_of_parts_is_nothing(world: World) -> None:
    ids = {(await world.send(list(order))).upload_id for order in permutations(world.sharded(count=2).items())}
    assert len(ids) == 1


@pytest.mark.asyncio
async def test_bytes_under_another_name_are_another_upload(world: World) -> None:
    one = await world.send(world.sharded(INDEX_NAMES[0]))
    two = await world.send(world.sharded(INDEX_NAMES[1]))
    swapped = await world.send({**world.whole, "tokenizer.json": b"{}", "vocab.json": b""})
    other = await world.send({**world.whole, "tokenizer.json": b"", "vocab.json": b"{}"})
    assert len({upload.upload_id for upload in (one, two, swapped, other)}) == 4


@pytest.mark.asyncio
async def test_mlx_weights_and_every_tokenizer_file_are_kept(world: World) -> None:
    files = {CONFIG_NAME: b"{}", MLX_WEIGHTS_NAME: b"weights", **{name: name.encode() for name in TOKENIZER_FILES}}
    upload = await world.send(files)
    assert {path.name: path.read_bytes() for path in (world.folder / upload.upload_id).iterdir()} == files


@pytest.mark.asyncio
async def test_a_quota_counts_every_file(world: World, tmp_path: Path) -> None:
    files = {**world.whole, "tokenizer.json": b"x" * 4000}
    store = UploadStore(tmp_path / "u", quota=3000 + sum(map(len, files.values())), max_bytes=MAX_BYTES)
    await store.receive(TYPE, pieces(body_of(list(files.items()))))
    with pytest.raises(AdapterStorageFull):
        await store.receive(TYPE, pieces(body_of([*world.whole.items(), ("tokenizer.json", b"y" * 4000)])))
    store.close()


Broken = Callable[[World], Files | list[tuple[str, bytes]]]


def without(name: str) -> Broken:
    return lambda world: {key: data for key, data in world.sharded().items() if key != name}


def with_more(name: str, data: bytes = b"x") -> Broken:
    return lambda world: {**world.sharded(), name: data}


BROKEN: dict[str, tuple[Broken, str]] = {
    "a shard is missing": (without("part-1.safetensors"), "lacks part-1.safetensors"),
    "no config": (without(CONFIG_NAME), f"lacks {CONFIG_NAME}"),
    "no index": (without(INDEX_NAMES[0]), f"lacks {WEIGHTS_NAME}, or in its place"),
    "config alone": (lambda world: {CONFIG_NAME: world.config}, f"lacks {WEIGHTS_NAME}"),
    "tokenizer alone": (lambda world: {"tokenizer.json": b"{}"}, f"lacks {CONFIG_NAME}"),
    "a shard that no index names": (with_more("more.safetensors"), "more.safetensors would not be read"),
    "a shard beside one file": (lambda world: {**world.whole, "a.safetensors": b"x"}, "a.safetensors would not"),
    "MLX's beside PEFT's": (lambda world: {**world.whole, MLX_WEIGHTS_NAME: b"x"}, f"{MLX_WEIGHTS_NAME} would not be"),
    "both indexes": (with_more(INDEX_NAMES[1], b"{}"), f"{INDEX_NAMES[1]} would not be read"),
    "a shard twice": (
        lambda world: [*world.sharded().items(), ("part-0.safetensors", b"x")], "part-0.safetensors is in the upload"
    ),
    "the index twice": (
        lambda world: [*world.sharded().items(), (INDEX_NAMES[0], b"{}")], f"{INDEX_NAMES[0]} is in the upload twice"
    ),
    "an unknown name": (with_more("README.md"), "'README.md' is not one of the files of an upload: adapter_config"),
    "code": (with_more("tokenizer.py"), "'tokenizer.py' is not one of the files"),
    "an index of another name": (with_more("other.safetensors.index.json"), "is not one of the files"),
    "a path": (with_more("../part-9.safetensors"), "is not one of the files"),
    "a path below": (with_more("a/part-9.safetensors"), "is not one of the files"),
    "a hidden shard": (with_more(".safetensors"), "is not one of the files"),
    "a long name": (with_more("x" * 250 + ".safetensors"), "is not one of the files"),
    "a shard with a blank": (with_more("a b.safetensors"), "is not one of the files"),
    "too many files": (
        lambda world: {f"{at}.safetensors": b"" for at in range(MAX_SHARDS + 50)}, "the upload has more than"
    ),
}  # fmt: skip


@pytest.mark.asyncio
@pytest.mark.parametrize("case", BROKEN)
async def test_what_is_not_one_adapter_is_refused_by_name(world: World, case: str) -> None:
    make, message = BROKEN[case]
    with pytest.raises(AdapterUploadInvalid) as caught:
        await world.send(make(world))
    assert message in str(caught.value)
    world.check_empty()


def _index_of(count: int) -> bytes:
    return json.dumps({"weight_map": {f"{at}": f"{at}.safetensors" for at in range(count)}}).encode()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("index", "code"),
    [
        (b"{}", RefusalCode.CORRUPT),
        (b"[", RefusalCode.CORRUPT),
        (b'{"weight_map": {"x": "../a.safetensors"}}', RefusalCode.CORRUPT),
        (b'{"weight_map": {"x": "/etc/passwd"}}', RefusalCode.CORRUPT),
        (b'{"weight_map": {"x": "a.bin"}}', RefusalCode.CORRUPT),
        (_index_of(MAX_SHARDS + 1), RefusalCode.TOO_LARGE),
    ],
)
async def test_an_index_that_says_nothing_of_use_leaves_nothing(world: World, index: bytes, code: RefusalCode) -> None:
    with pytest.raises(AdapterRefused) as caught:
        await world.send({**world.sharded(), INDEX_NAMES[0]: index})
    assert caught.value.reason is code
    world.check_empty()


@pytest.mark.asyncio
async def test_a_file_and_an_index_are_ambiguous_as_in_a_folder(world: World) -> None:
    with pytest.raises(AdapterRefused) as caught:
        await world.send({**world.whole, **world.sharded()})
    assert caught.value.reason is RefusalCode.AMBIGUOUS_LAYOUT
    world.check_empty()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"a.safetensors": MAX_BYTES // 2, "b.safetensors": MAX_BYTES // 2 + 1}, f"max_adapter_bytes={MAX_BYTES}"),
        ({MLX_WEIGHTS_NAME: MAX_BYTES + 1}, f"max_adapter_bytes={MAX_BYTES}"),
        ({INDEX_NAMES[1]: MAX_INDEX_BYTES + 1}, f"max_index_bytes={MAX_INDEX_BYTES}"),
        ({"tokenizer.json": own_tokenizer.MAX_BYTES + 1}, f"max_tokenizer_bytes={own_tokenizer.MAX_BYTES}"),
    ],
)
async def test_each_name_has_its_limit_and_weights_share_one(world: World, files: dict[str, int], limit: str) -> None:
    with pytest.raises(AdapterRefused) as caught:
        await world.send({name: bytes(size) for name, size in files.items()}, 1 << 20)
    assert caught.value.reason is RefusalCode.TOO_LARGE and limit in str(caught.value)
    world.check_empty()


@pytest.mark.asyncio
async def test_shards_cut_at_any_part_leave_nothing(world: World) -> None:
    body = body_of(list(world.sharded().items()))
    for end in range(0, len(body) - 4, 61):
        with pytest.raises(AdapterUploadInvalid, match="cut off"):
            await world.store.receive(TYPE, pieces(body[:end]))
    world.check_empty()
