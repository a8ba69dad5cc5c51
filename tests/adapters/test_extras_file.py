"""What adapters hold besides pairs goes to disk and comes back to the bit, or is told to be damaged."""

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import extras_file
from adapters.adapter_extras import (
    NO_EXTRAS,
    AdapterExtras,
    EmbeddingAdapter,
    ExpertPair,
    ExpertPairs,
    HeadAdapter,
    TokenRows,
)
from adapters.errors import VersionDamaged
from adapters.lora_model import LoRAModel
from adapters.packed_modules import PackedModules, layout_of
from adapters.version_store import VersionStore
from tests.adapters.version_samples import KEY, assert_same, bits, model_of, version_of


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def everything(base_print: str = "base 1") -> AdapterExtras:
    rows = TokenRows(torch.tensor([3, 90]), drawn(2, 7, dtype=torch.bfloat16))
    return AdapterExtras(
        gains=MappingProxyType({"model.embed_tokens": drawn(7), "model.layers.0.q_proj": drawn(13)}),
        gain_covers_bias=frozenset({"model.layers.0.q_proj"}),
        input_scales=MappingProxyType({"model.layers.1.down_proj": drawn(5)}),
        biases=MappingProxyType({"model.layers.0.q_proj": drawn(13)}),
        norms=MappingProxyType({"model.norm.weight": drawn(7)}),
        embedding=EmbeddingAdapter(drawn(96, 3).bfloat16(), drawn(3, 7).bfloat16(), rows, None),
        head=HeadAdapter(None, drawn(98, 7).bfloat16(), drawn(98)),
        experts=MappingProxyType(
            {"model.layers.0.mlp.experts": ExpertPairs(ExpertPair(drawn(4, 2, 7), drawn(4, 2, 10)), None)}
        ),
        vocab_size=98,
        invocation_tokens=(20, 21),
        tokenizer_files=MappingProxyType({"tokenizer.json": b"{}\x00", "chat_template.jinja": b""}),
        replaced=frozenset({"model.norm.weight", "vocabulary"}),
        base_print=base_print,
    )


def assert_extras_same(read: AdapterExtras, put: AdapterExtras) -> None:
    assert extras_file.table_of(read) == extras_file.table_of(put)
    for ours, theirs in zip(read.tensors(), put.tensors(), strict=True):
        assert (ours.dtype, ours.shape, bits(ours)) == (theirs.dtype, theirs.shape, bits(theirs))
    for field in ("gain_covers_bias", "vocab_size", "invocation_tokens", "replaced", "base_print", "num_bytes"):
        assert getattr(read, field) == getattr(put, field), field
    assert dict(read.tokenizer_files) == dict(put.tokenizer_files)
    assert (read.head is None, read.embedding is None) == (put.head is None, put.embedding is None)


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path, base_key=KEY, fingerprint="base 1")


def test_all_comes_back(store: VersionStore) -> None:
    put = replace(model_of(0), extras=everything())
    store.put(put)
    read = store.read(put.version)
    assert_same(read, put)
    assert_extras_same(read.extras, put.extras)
    assert read.num_bytes == model_of(0).num_bytes + put.extras.num_bytes > model_of(0).num_bytes


@given(st.sets(st.sampled_from([field for field in AdapterExtras.__dataclass_fields__ if field != "base_print"])))
@settings(max_examples=40, deadline=None)
def test_any_parts_come_back(parts: set[str]) -> None:
    put = replace(NO_EXTRAS, **{part: getattr(everything(), part) for part in parts})
    memory = torch.zeros(extras_file.num_bytes(put), dtype=torch.uint8)
    extras_file.write_into(put, memory)
    assert_extras_same(extras_file.read_from(extras_file.table_of(put), memory), put)
    assert bool(put) == bool(parts - {"vocab_size", "gain_covers_bias"})


def test_an_adapter_without_a_pair_comes_back(store: VersionStore) -> None:
    nothing = PackedModules(layout_of((), align=64), torch.zeros(0, dtype=torch.bfloat16))
    put = LoRAModel(version_of(1), nothing, extras=replace(NO_EXTRAS, norms=everything().norms))
    assert (put.lora_rank, put.num_bytes) == (0, 28 + 4 * 16)  # seven numbers, and two vectors of them
    store.put(put)
    read = store.read(put.version)
    assert (len(read.modules), read.lora_rank) == (0, 0)
    assert_extras_same(read.extras, put.extras)


def test_a_plain_adapter_is_stored_as_before(store: VersionStore, tmp_path: Path) -> None:
    store.put(model_of(0))
    data = next(tmp_path.rglob("*.safetensors")).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["format"] == "3" and header.keys() == {"__metadata__", "weights"}
    assert store.read(version_of(0)).extras is NO_EXTRAS


def test_what_was_made_from_other_base_weights_is_not_read(store: VersionStore, tmp_path: Path) -> None:
    put = replace(model_of(0), extras=everything("base 2"))
    store.put(put)
    with pytest.raises(VersionDamaged, match="prepared from other weights of the base"):
        store.read(put.version)
    assert_same(VersionStore(tmp_path, base_key=KEY, fingerprint="base 2").read(put.version), put)


def test_a_byte_that_changed_is_found_anywhere_in_the_extras(store: VersionStore, tmp_path: Path) -> None:
    put = replace(model_of(0), extras=everything())
    store.put(put)
    path = next(tmp_path.rglob("*.safetensors"))
    whole = path.read_bytes()
    for place in range(len(whole) - extras_file.num_bytes(put.extras), len(whole), 211):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(VersionDamaged):
            store.read(put.version)
    path.write_bytes(whole)
    assert_same(store.read(put.version), put)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["tensors"].pop(),
        lambda fields: fields["tensors"][0].pop(),
        lambda fields: fields["tensors"][0].__setitem__(1, "torch.complex64"),
        lambda fields: fields.pop("replaced"),
        lambda fields: fields["tensors"][0].__setitem__(2, [13, 13]),
    ],
)
def test_a_table_of_something_else_is_refused(change: object) -> None:
    extras = everything()
    fields = json.loads(extras_file.table_of(extras))
    change(fields)  # type: ignore[operator]
    memory = torch.zeros(extras_file.num_bytes(extras), dtype=torch.uint8)
    with pytest.raises((ValueError, KeyError, TypeError)):
        extras_file.read_from(json.dumps(fields), memory)
