"""The header parser: what the reference library writes is read, and no bytes get past it as another exception."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from adapters.errors import AdapterError, AdapterRefused, RefusalCode
from adapters.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    TensorEntry,
    header_length,
    parse_header,
    require_matrix,
)


def parse_file(raw: bytes) -> dict[str, TensorEntry]:
    length = header_length(raw[:LENGTH_BYTES], file_bytes=len(raw), what="f")
    header = raw[LENGTH_BYTES : LENGTH_BYTES + length]
    return parse_header(header, data_bytes=len(raw) - LENGTH_BYTES - length, what="f")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64])
def test_reads_what_the_reference_library_writes(dtype: torch.dtype) -> None:
    tensors = {"b": torch.ones(3, 5, dtype=dtype), "a.x": torch.zeros(2, 2, dtype=dtype), "s": torch.ones(7).to(dtype)}
    entries = parse_file(save(tensors, metadata={"format": "pt"}))
    assert {name: entry.shape for name, entry in entries.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert sum(entry.num_bytes for entry in entries.values()) == sum(t.nbytes for t in tensors.values())


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8))
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F4", "x"]), SCALARS),
        "shape": st.one_of(st.lists(st.integers(-1, 9), max_size=3), SCALARS, st.lists(SCALARS, max_size=3)),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 99), max_size=3), SCALARS),
        "more": SCALARS,
    },
)
HEADER = st.dictionaries(st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=9)), ENTRY, max_size=4)


@settings(max_examples=600, deadline=None)
@given(HEADER, st.integers(0, 200))
def test_no_header_raises_anything_but_a_refusal(header: dict[str, object], data_bytes: int) -> None:
    raw = json.dumps(header).encode()
    try:
        entries = parse_header(raw, data_bytes=data_bytes, what="f")
    except AdapterError:
        return
    assert sum(entry.num_bytes for entry in entries.values()) == data_bytes


@settings(max_examples=600, deadline=None)
@given(st.binary(max_size=300))
def test_no_file_raises_anything_but_a_refusal(raw: bytes) -> None:
    with pytest.raises(AdapterRefused):
        parse_file(raw)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_one_changed_byte_gives_a_refusal_or_a_table_that_still_covers_the_file(data: st.DataObject) -> None:
    raw = bytearray(save({"m.lora_A.weight": torch.ones(2, 3), "m.lora_B.weight": torch.ones(3, 2)}))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        entries = parse_file(bytes(raw))
    except AdapterRefused:
        return
    spans = sorted((entry.begin, entry.end) for entry in entries.values())
    assert spans[0][0] == 0 and all(left[1] == right[0] for left, right in zip(spans, spans[1:], strict=False))


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=8, max_size=8), st.integers(8, 2**40))
def test_a_header_length_is_within_the_file_and_the_limit(prefix: bytes, file_bytes: int) -> None:
    try:
        length = header_length(prefix, file_bytes=file_bytes, what="f")
    except AdapterRefused:
        return
    assert 0 <= length <= min(file_bytes - 8, MAX_HEADER_BYTES)


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        (TensorEntry("t", "F32", (0, 4), 0, 0), RefusalCode.CORRUPT),
        (TensorEntry("t", "F32", (4,), 0, 16), RefusalCode.UNSUPPORTED),
        (TensorEntry("t", "F32", (1, 2, 2), 0, 16), RefusalCode.UNSUPPORTED),
        (TensorEntry("t", "I8", (4, 4), 0, 16), RefusalCode.UNSUPPORTED),
        (TensorEntry("t", "F8_E4M3", (4, 4), 0, 16), RefusalCode.UNSUPPORTED),
    ],
)
def test_only_matrices_of_floats_are_lora(entry: TensorEntry, code: RefusalCode) -> None:
    with pytest.raises(AdapterRefused) as caught:
        require_matrix(entry)
    assert (caught.value.reason, caught.value.tensor) == (code, "t")
    for dtype in ("F32", "F16", "BF16"):
        require_matrix(TensorEntry("t", dtype, (1, 1), 0, 4))


def test_the_header_limit_has_room_for_the_tensor_limit() -> None:
    name = "base_model.model.model.layers.100.block_sparse_moe.shared_expert.down_projection.lora_A.default.weight"
    line = json.dumps({name: {"dtype": "BF16", "shape": [256, 65536], "data_offsets": [10**10, 10**10 + 1]}})
    assert len(line) < 256


@pytest.mark.parametrize(
    ("spans", "data_bytes", "word"),
    [
        ([(0, 16), (0, 16)], 16, "overlaps"),
        ([(0, 16), (12, 28)], 28, "overlaps"),
        ([(0, 16), (20, 36)], 36, "leaves a hole"),
        ([(4, 20)], 20, "leaves a hole"),
    ],
)
def test_no_byte_has_two_owners_or_none(spans: list[tuple[int, int]], data_bytes: int, word: str) -> None:
    header = {f"t{i}": {"dtype": "F32", "shape": [2, 2], "data_offsets": span} for i, span in enumerate(spans)}
    with pytest.raises(AdapterRefused, match=word):
        parse_header(json.dumps(header).encode(), data_bytes=data_bytes, what="f")
