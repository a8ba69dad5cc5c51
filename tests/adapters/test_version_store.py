"""What is read from the store is what was put, bit for bit, or it is an error; nothing in between is ever there."""

import errno
import gc
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from adapters import version_file
from adapters.adapter_ref import AdapterVersion
from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.errors import VersionDamaged, VersionStoreFailed
from adapters.host_memory import HostMemory
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.module_names import BaseModules, LinearShape
from adapters.packed_modules import PackedModules
from adapters.version_store import VersionStore, base_key
from tests.adapters.hostile import draft
from tests.adapters.version_samples import KEY, assert_same, model_of, version_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VersionStore]:
    store = VersionStore(tmp_path, base_key=KEY)
    yield store
    store.check_integrity()


def file_of(folder: Path, number: int) -> Path:
    return folder / KEY / f"{version_of(number)}.safetensors"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_read_is_what_was_put(store: VersionStore, dtype: torch.dtype) -> None:
    for number in range(3):
        put = model_of(number, lora_rank=1 + number, dtype=dtype)
        num_bytes = store.put(put)
        assert_same(store.read(put.version), put)
        assert num_bytes > put.num_bytes


def test_a_loaded_adapter_comes_back(store: VersionStore, tmp_path: Path) -> None:
    shapes = {"q_proj": LinearShape(12, 20), "v_proj": LinearShape(12, 4), "down_proj": LinearShape(20, 12)}
    base = BaseModules("tiny", {f"model.layers.{i}.{kind}": s for i in range(3) for kind, s in shapes.items()})
    draft(tmp_path / "adapter", base, num_modules=9).write()
    limits = CheckpointLimits(max_lora_rank=64, max_adapter_bytes=1 << 28)
    loaded = load_lora_model(tmp_path / "adapter", base, limits=limits, dtype=torch.bfloat16).model
    store.put(loaded)
    read = store.read(loaded.version)
    assert_same(read, loaded)
    assert isinstance(read.modules, PackedModules) and isinstance(loaded.modules, PackedModules)
    assert read.modules.layout is loaded.modules.layout
    assert read.modules.flat.data_ptr() % 4096 == 0  # a mapping of its own


def test_bits_that_equal_nothing_come_back(store: VersionStore) -> None:
    """NaN of any payload, infinities, both zeros, subnormals: all 65536 numbers of bfloat16."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(16, 4096)
    put = LoRAModel(version_of(0), {"m": LoRAWeights(every, every.flip(0))}, ("é \ud800",), {"m": 0.1 + 0.2})
    store.put(put)
    assert_same(store.read(put.version), put)


def test_a_plain_mapping_is_packed(store: VersionStore) -> None:
    weights = {
        "a": LoRAWeights(torch.randn(2, 3), torch.randn(2, 5)),
        "b": LoRAWeights(torch.ones(4, 1), torch.ones(4, 1)),
    }
    put = LoRAModel(version_of(0), weights)
    store.put(put)
    assert_same(store.read(put.version), put)
    assert store.read(put.version).delta_norms is None


def test_layouts_are_shared_with_what_is_in_memory(store: VersionStore) -> None:
    for number in range(3):
        store.put(model_of(number, lora_rank=3 if number < 2 else 5))
    gc.collect()
    layouts = [packed(store.read(version_of(number))).layout for number in range(3)]
    assert layouts[0] is layouts[1] and layouts[0] is not layouts[2]


def packed(model: LoRAModel) -> PackedModules:
    assert isinstance(model.modules, PackedModules)
    return model.modules


def test_a_file_is_a_safetensors_file(store: VersionStore, tmp_path: Path) -> None:
    put = model_of(1)
    store.put(put)
    with safe_open(file_of(tmp_path, 1), framework="pt") as file:
        assert torch.equal(file.get_tensor("weights"), packed(put).flat)
        assert file.metadata()["version"] == put.version


def test_what_was_put_is_there_after_a_restart(store: VersionStore, tmp_path: Path) -> None:
    sizes = [store.put(model_of(number)) for number in range(3)]
    again = VersionStore(tmp_path, base_key=KEY)
    assert again.num_bytes == store.num_bytes == sum(sizes)
    assert again.versions() == tuple(sorted(map(version_of, range(3))))
    assert_same(again.read(version_of(2)), model_of(2))


def test_the_same_again_writes_nothing(store: VersionStore, tmp_path: Path) -> None:
    num_bytes = store.put(model_of(1))
    before = file_of(tmp_path, 1).stat()
    assert store.put(model_of(1)) == num_bytes == store.num_bytes == before.st_size
    after = file_of(tmp_path, 1).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_damaged_file_is_replaced(store: VersionStore, tmp_path: Path) -> None:
    store.put(model_of(1))
    path = file_of(tmp_path, 1)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], b"", whole[:5]):
        path.write_bytes(damaged)
        assert store.put(model_of(1)) == len(whole) and path.read_bytes() == whole


def test_what_was_prepared_otherwise_is_replaced(store: VersionStore) -> None:
    """A version names what was trained; a later program may prepare it in another way."""
    store.put(model_of(1))
    other = LoRAModel(version_of(1), model_of(2).modules)
    store.put(other)
    assert_same(store.read(version_of(1)), other)


def test_what_is_not_there(store: VersionStore) -> None:
    store.put(model_of(1))
    for absent in (version_of(2), AdapterVersion("../x"), AdapterVersion(""), AdapterVersion(version_of(1).upper())):
        assert absent not in store and store.remove(absent) == 0
        with pytest.raises(KeyError):
            store.read(absent)
    assert 7 not in store


@pytest.mark.parametrize("version", ["a", "../" + "a" * 61, "A" * 64, "a" * 64 + "\n"])
def test_a_name_that_is_no_version_is_never_a_path(store: VersionStore, version: str) -> None:
    model = model_of(1)
    with pytest.raises(ValueError, match="no version"):
        store.put(LoRAModel(AdapterVersion(version), model.modules))


def test_removing_gives_bytes_back(store: VersionStore) -> None:
    num_bytes = store.put(model_of(1))
    store.put(model_of(2))
    held = store.read(version_of(1))
    assert store.remove(version_of(1)) == num_bytes and store.remove(version_of(1)) == 0
    assert version_of(1) not in store and store.versions() == (version_of(2),)
    assert_same(held, model_of(1))
    assert store.num_bytes == num_bytes


def test_what_another_process_does_is_seen(store: VersionStore, tmp_path: Path) -> None:
    other = VersionStore(tmp_path, base_key=KEY)
    other.put(model_of(1))
    assert store.num_bytes == 0 and version_of(1) in store and store.num_bytes == other.num_bytes
    store.remove(version_of(1))
    with pytest.raises(KeyError):
        other.read(version_of(1))
    assert other.num_bytes == 0


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = VersionStore(tmp_path / "deep" / "er", base_key=KEY)
        store.put(model_of(1))
    finally:
        os.umask(old)
    for folder in (tmp_path / "deep", tmp_path / "deep" / "er", tmp_path / "deep" / "er" / KEY):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in (tmp_path / "deep" / "er" / KEY).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_base_key_is_a_folder_and_is_checked(store: VersionStore, tmp_path: Path) -> None:
    store.put(model_of(1))
    other = VersionStore(tmp_path, base_key="other")
    assert version_of(1) not in other
    file_of(tmp_path, 1).rename(tmp_path / "other" / file_of(tmp_path, 1).name)
    with pytest.raises(VersionDamaged, match="base_key is base, where other"):
        other.read(version_of(1))
    assert version_of(1) not in store
    for wrong in ("", "..", "a/b", "a" * 65):
        with pytest.raises(ValueError):
            VersionStore(tmp_path, base_key=wrong)


def test_base_keys_follow_shapes_and_dtype() -> None:
    linears = {"a.q": LinearShape(4, 8), "a.k": LinearShape(8, 4)}
    base = BaseModules("tiny", linears)
    same = BaseModules("tiny", dict(reversed(linears.items())), {"x": "because"}, (("a.q",),))
    others = [
        {"a.q": LinearShape(4, 8)},
        linears | {"a.k": LinearShape(4, 8)},
        {"a.q": LinearShape(4, 8), "a.v": LinearShape(8, 4)},
    ]
    keys = {base_key(BaseModules("tiny", other), torch.bfloat16) for other in others}
    keys |= {base_key(base, dtype) for dtype in DTYPES}
    assert len(keys) == 6 and base_key(same, torch.bfloat16) == base_key(base, torch.bfloat16)
    assert all(len(key) == 64 for key in keys)


# Damage


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[VersionStore, Path, bytes]:
    folder = tmp_path_factory.mktemp("damaged")
    store = VersionStore(folder, base_key=KEY)
    store.put(model_of(1))
    return store, file_of(folder, 1), file_of(folder, 1).read_bytes()


DAMAGE = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_refused(store: VersionStore, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(VersionDamaged, match=f"{version_of(1)}.safetensors: .*Load the adapter again"):
        store.read(version_of(1))


@DAMAGE
@given(data=st.data())
def test_flipped_bits_are_found(damaged: tuple[VersionStore, Path, bytes], data: st.DataObject) -> None:
    store, path, whole = damaged
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    places = st.one_of(st.integers(0, 120), st.integers(0, header_bytes), st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    for place, mask in data.draw(st.dictionaries(places, st.integers(1, 255), min_size=1, max_size=4)).items():
        changed[place] ^= mask
    assert_refused(store, path, bytes(changed))


@DAMAGE
@given(data=st.data())
def test_a_file_that_is_shorter_or_longer_is_found(
    damaged: tuple[VersionStore, Path, bytes], data: st.DataObject
) -> None:
    store, path, whole = damaged
    if data.draw(st.booleans()):
        changed = whole[: data.draw(st.one_of(st.integers(0, 120), st.integers(0, len(whole) - 1)))]
    else:
        changed = whole + data.draw(st.binary(min_size=1, max_size=9))
    assert_refused(store, path, changed)


@DAMAGE
@given(data=st.data())
def test_blocks_of_zeros_are_found(damaged: tuple[VersionStore, Path, bytes], data: st.DataObject) -> None:
    """What a file system leaves that lost a block."""
    store, path, whole = damaged
    begin = data.draw(st.integers(0, len(whole) // 512 - 1)) * 512
    changed = whole[:begin] + bytes(512) + whole[begin + 512 :]
    if changed == whole:  # the spaces after the header's end are no zeros, but a layout's padding is
        return
    assert_refused(store, path, changed)


@DAMAGE
@given(garbage=st.binary(max_size=400))
def test_garbage_is_found(damaged: tuple[VersionStore, Path, bytes], garbage: bytes) -> None:
    store, path, _ = damaged
    assert_refused(store, path, garbage)


def test_a_huge_file_takes_no_memory(store: VersionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail of a terabyte, and a header that says it is as long."""
    store.put(model_of(1))
    path = file_of(tmp_path, 1)
    monkeypatch.setattr(HostMemory, "empty", lambda *_, **__: pytest.fail("memory was taken"))
    os.truncate(path, 1 << 40)
    with pytest.raises(VersionDamaged, match="bytes of weights"):
        store.read(version_of(1))
    with path.open("r+b") as file:
        file.write((1 << 39).to_bytes(8, "little"))
    with pytest.raises(VersionDamaged, match="does not fit"):
        store.read(version_of(1))
    path.unlink()
    assert version_of(1) not in store


def test_another_versions_file_is_found(store: VersionStore, tmp_path: Path) -> None:
    store.put(model_of(1))
    file_of(tmp_path, 1).rename(file_of(tmp_path, 2))
    with pytest.raises(VersionDamaged, match="its version is"):
        store.read(version_of(2))
    assert version_of(1) not in store


@pytest.mark.parametrize(
    "text", ["", '"}}', '","format":"2"}}', '","format":"1"}}', '","format":1},"weights":{}}', '"' + "[" * 100_000]
)
def test_a_sealed_header_of_another_program_is_no_crash(store: VersionStore, tmp_path: Path, text: str) -> None:
    file_of(tmp_path, 1).write_bytes(version_file.seal(text))
    with pytest.raises(VersionDamaged):
        store.read(version_of(1))


def test_what_is_no_file_is_found(store: VersionStore, tmp_path: Path) -> None:
    file_of(tmp_path, 1).mkdir()
    os.mkfifo(file_of(tmp_path, 2))
    for number in (1, 2):
        with pytest.raises(VersionDamaged, match="it is no file"):
            store.read(version_of(number))
    with pytest.raises(VersionStoreFailed, match="EISDIR"):
        store.put(model_of(1))
    store.put(model_of(2))
    assert_same(store.read(version_of(2)), model_of(2))


def test_a_disk_that_cannot_read(store: VersionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(model_of(1))

    def fail(number: int) -> None:
        def readv(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "readv", readv)

    fail(errno.EIO)
    with pytest.raises(VersionDamaged, match="Input/output error"):
        store.read(version_of(1))
    fail(errno.EMFILE)
    with pytest.raises(VersionStoreFailed, match="EMFILE"):
        store.read(version_of(1))
