"""Copies A and B of many modules from a piece of a file into an adapter's flat tensor by a few strided operations.

Modules of one kind lie at equal distances, in the file and in memory, so that all of them are one tensor of one
dimension more. An operation each would take longer to call than to run, and each call gives up the interpreter's lock
and asks for it again, which a busy server grants late. Knows nothing of files or of names' meaning.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.host_memory import HostMemory
from adapters.packed_modules import PackedLayout, kind_of

_AT_ONCE = 1 << 20  # elements that are converted together: 4 MiB in float32


@dataclass(frozen=True, slots=True)
class Run:
    """`count` tensors [rows, columns] of one dtype, every `stride` elements from `begin` on in the piece; they go to
    every `to_stride` elements from `to_begin` on in the flat tensor.

    `scale` None: A, as it is; else B, of which (scale · B)ᵀ is kept.
    """

    dtype: torch.dtype
    count: int
    rows: int
    columns: int
    begin: int
    stride: int
    to_begin: int
    to_stride: int
    scale: float | None


@dataclass(frozen=True, slots=True)
class NormGroup:
    """Modules whose A [r, in] and B [r, out] lie every `a_stride` and `b_stride` elements in the flat tensor."""

    names: tuple[str, ...]
    lora_rank: int
    in_features: int
    out_features: int
    a_begin: int
    a_stride: int
    b_begin: int
    b_stride: int


class RunPart(NamedTuple):
    """One tensor of a run to be. `kind`: what its module is called, since those of a kind lie at equal distances."""

    kind: str
    dtype: torch.dtype
    rows: int
    columns: int
    scale: float | None
    begin: int
    to_begin: int


def plan_runs(parts: Iterable[RunPart]) -> tuple[Run, ...]:
    alike: dict[tuple[object, ...], list[RunPart]] = {}
    for part in parts:
        alike.setdefault(part[:5], []).append(part)
    runs = []
    for some in alike.values():
        some.sort(key=lambda part: part.begin)
        places = [(part.begin, part.to_begin) for part in some]
        for first, count, (stride, to_stride) in evenly_spaced(places, _at_once(some[0].rows * some[0].columns)):
            part = some[first]
            runs.append(
                Run(
                    part.dtype, count, part.rows, part.columns, part.begin, stride, part.to_begin, to_stride, part.scale
                )
            )
    return tuple(runs)


def plan_norms(layout: PackedLayout) -> tuple[NormGroup, ...]:
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, place in layout.places.items():
        alike.setdefault((kind_of(name), place.lora_rank, place.in_features, place.out_features), []).append(name)
    groups = []
    for names in alike.values():
        first_place = layout.places[names[0]]
        rank, in_features, out_features = first_place.lora_rank, first_place.in_features, first_place.out_features
        places = [(layout.places[name].a_begin, layout.places[name].b_begin) for name in names]
        for first, count, (a_stride, b_stride) in evenly_spaced(
            places, _at_once(rank * max(in_features, out_features))
        ):
            (a_begin, b_begin), some = places[first], tuple(names[first : first + count])
            groups.append(NormGroup(some, rank, in_features, out_features, a_begin, a_stride, b_begin, b_stride))
    return tuple(groups)


def evenly_spaced(places: Sequence[tuple[int, int]], at_most: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(first, count, strides) of stretches in which both numbers grow by a constant; strides of one alone are zero."""
    first = 0
    while first < len(places):
        count, strides = 1, (0, 0)
        while count < at_most and first + count < len(places):
            (x, y), (next_x, next_y) = places[first + count - 1], places[first + count]
            step = (next_x - x, next_y - y)
            if (count > 1 and step != strides) or min(step) <= 0:
                break
            count, strides = count + 1, step
        yield first, count, strides
        first += count


def copy_run(run: Run, piece: Tensor, flat: Tensor) -> None:
    """`piece` [num_bytes] uint8 as read, `flat` [num_elements] in the compute dtype."""
    stored = piece[: piece.numel() // run.dtype.itemsize * run.dtype.itemsize].view(run.dtype)
    source = stored.as_strided(
        (run.count, run.rows, run.columns), (run.stride, run.columns, 1), stored.storage_offset() + run.begin
    )
    if run.scale is None:
        _copy(source, _strided(flat, run.to_begin, (run.count, run.rows, run.columns), run.to_stride))
        return
    ready = _float_room(source).copy_(source).mul_(run.scale)  # [count, out, r]
    target = _strided(flat, run.to_begin, (run.count, run.columns, run.rows), run.to_stride)
    if flat.dtype != torch.float32:  # turned in the narrow dtype: half the memory that is read across its rows
        ready = _narrow_room(source, flat.dtype).copy_(ready)
    target.copy_(ready.transpose(1, 2))


def _copy(source: Tensor, target: Tensor) -> None:
    """Over float32 where both are narrower: torch takes twice as long from float16 to bfloat16 directly."""
    if torch.float32 in (source.dtype, target.dtype) or source.dtype == target.dtype:
        target.copy_(source)
    else:
        target.copy_(_float_room(source).copy_(source))


class Grams(NamedTuple):
    """Of one group of modules, float32 [n, r, r]."""

    a: Tensor
    b: Tensor


def grams(group: NormGroup, flat: Tensor) -> Grams:
    """A Aᵀ and B Bᵀ of the modules, summed in float32."""
    shape = (len(group.names), group.lora_rank)
    lora_a = _strided(flat, group.a_begin, (*shape, group.in_features), group.a_stride)
    first = _gram(lora_a)
    return Grams(first, _gram(_strided(flat, group.b_begin, (*shape, group.out_features), group.b_stride)))


def _gram(matrices: Tensor) -> Tensor:
    """[n, r, k] → [n, r, r]."""
    wide = matrices if matrices.dtype == torch.float32 else _float_room(matrices).copy_(matrices)
    return torch.bmm(wide, wide.transpose(1, 2))


def _strided(flat: Tensor, begin: int, shape: tuple[int, int, int], stride: int) -> Tensor:
    return flat.as_strided(shape, (stride, shape[2], 1), flat.storage_offset() + begin)


def _at_once(num_elements: int) -> int:
    return max(1, _AT_ONCE // max(1, num_elements))


class _Rooms(local):
    """A thread's own memory for what is on its way from one dtype to another."""

    def __init__(self) -> None:
        self._rooms: dict[torch.dtype, Tensor] = {}

    def of(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_elements = 1
        for size in shape:
            num_elements *= size
        if num_elements > _AT_ONCE:
            return torch.empty(*shape, dtype=dtype)
        if dtype not in self._rooms:
            self._rooms[dtype] = HostMemory(0).empty(_AT_ONCE, dtype=dtype)
        return self._rooms[dtype][:num_elements].view(*shape)


_rooms = _Rooms()


def _float_room(like: Tensor) -> Tensor:
    return _rooms.of(like.shape, torch.float32)


def _narrow_room(like: Tensor, dtype: torch.dtype) -> Tensor:
    return _rooms.of(like.shape, dtype)
