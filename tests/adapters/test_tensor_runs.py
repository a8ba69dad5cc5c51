"""Runs of equal tensors copy what one operation each would, however the tensors lie."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.header_table import StoredTensor
from adapters.safetensors_header import TensorEntry
from adapters.tensor_pieces import Piece, plan_pieces, read_piece, tensor_in
from adapters.tensor_runs import RunPart, copy_run, evenly_spaced, plan_runs

PLACES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=30, unique=True).map(sorted)


@settings(max_examples=200, deadline=None)
@given(PLACES, st.integers(1, 8))
def test_stretches_cover_all_places_once_and_are_even(places: list[tuple[int, int]], at_most: int) -> None:
    covered = []
    for first, count, strides in evenly_spaced(places, at_most):
        assert 1 <= count <= at_most and (count == 1 or min(strides) > 0)
        covered += [(places[first][0] + i * strides[0], places[first][1] + i * strides[1]) for i in range(count)]
    assert covered == list(places)


def test_layers_of_one_kind_are_one_stretch() -> None:
    assert len(list(evenly_spaced([(100 * i, 70 * i) for i in range(30)], 64))) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.sampled_from("ab")), min_size=1),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_runs_equal_one_copy_each(
    tensors: list[tuple[int, int, bool, str]], stored: torch.dtype, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(len(tensors))
    values = [torch.randn(rows, columns, generator=generator).to(stored) for rows, columns, _, _ in tensors]
    piece = torch.cat([value.flatten() for value in values]).view(torch.uint8)
    parts, begin = [], 0
    for (rows, columns, is_a, kind), value in zip(tensors, values, strict=True):
        parts.append(RunPart(kind, stored, rows, columns, None if is_a else 1.5, begin, begin))
        begin += value.numel()
    flat = torch.zeros(begin, dtype=dtype)
    for run in plan_runs(parts):
        copy_run(run, piece, flat)
    for part, value in zip(parts, values, strict=True):
        wanted = value.float() if part.scale is None else (value.float() * part.scale).T
        found = flat[part.to_begin : part.to_begin + value.numel()]
        assert torch.equal(found, wanted.to(dtype).flatten())


class Hashed:
    def __init__(self) -> None:
        self.data = b""

    def update(self, data: memoryview, /) -> None:
        self.data += bytes(data)


class FakeFile:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def read_into(self, target: memoryview, offset: int) -> None:
        target[:] = self.data[offset : offset + len(target)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 9), st.sampled_from(["F32", "F16", "I8"])), min_size=1),
    st.randoms(),
)
def test_pieces_hash_the_tensors_in_their_order_whatever_lies_where(
    tensors: list[tuple[int, int, str]], random
) -> None:  # type: ignore[no-untyped-def]
    sizes, ends = {"F32": 4, "F16": 2, "I8": 1}, [8, 8]
    stored, order = {}, list(range(len(tensors)))
    random.shuffle(order)
    for number in order:
        file, count, dtype = tensors[number]
        entry = TensorEntry(f"t{number:03}", dtype, (count,), 0, count * sizes[dtype])
        stored[number] = StoredTensor(entry, file, ends[file])
        ends[file] += entry.num_bytes
    files = [FakeFile(random.randbytes(end)) for end in ends]
    hashed, wanted = Hashed(), b""
    pieces: tuple[Piece, ...] = plan_pieces(stored[number] for number in range(len(tensors)))
    memories = [read_piece(piece, files, hashed) for piece in pieces]  # type: ignore[arg-type]
    assert len(pieces) == 1
    for number in range(len(tensors)):
        each = stored[number]
        data = files[each.file].data[each.offset : each.offset + each.entry.num_bytes]
        wanted += data
        if each.entry.dtype != "I8":
            found = tensor_in(memories[0], pieces[0].begins[number], each)
            assert found.view(torch.uint8).numpy().tobytes() == data
    assert hashed.data == wanted
