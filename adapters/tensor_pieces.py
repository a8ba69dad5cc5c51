"""Reads the tensors of an adapter's files in pieces of some megabytes, in the order of their names, into one memory.

Neighbours in a file are read, and hashed, together: hundreds of tensors take a handful of calls, each of which lets
other threads run. The memory is kept, one for each thread that loads. Knows nothing of what the tensors mean.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from threading import local
from typing import Protocol

import torch
from torch import Tensor

from adapters.adapter_folder import OpenFile
from adapters.header_table import StoredTensor
from adapters.host_memory import HostMemory
from adapters.safetensors_header import TORCH_DTYPES

PIECE_BYTES = 16 << 20
_ALIGNMENT = 64  # bytes, of a tensor that would not lie at a multiple of its own items


class Digest(Protocol):
    def update(self, data: memoryview, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Read:
    """`num_bytes` from `offset` on in a file, to `begin` in the piece's memory."""

    file: int
    offset: int
    begin: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors that are in memory at one time. `hashed`: the ranges of that memory that hold them, in order."""

    reads: tuple[Read, ...]
    hashed: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    begins: tuple[int, ...]  # of each, in bytes
    num_bytes: int


def plan_pieces(tensors: Iterable[StoredTensor]) -> tuple[Piece, ...]:
    """`tensors` in the order of their names. A tensor larger than a piece is one by itself."""
    pieces, some, end = [], list[tuple[StoredTensor, int]](), 0
    for stored in tensors:
        begin = _aligned(end, stored)
        if some and begin + stored.entry.num_bytes > PIECE_BYTES:
            pieces.append(_piece(some))
            some, begin = [], 0
        some.append((stored, begin))
        end = begin + stored.entry.num_bytes
    return (*pieces, _piece(some)) if some else tuple(pieces)


def read_piece(piece: Piece, files: Sequence[OpenFile], digest: Digest) -> Tensor:
    """[num_bytes] uint8, of this thread until it reads the next piece."""
    memory = _scratch.of(piece.num_bytes)
    view = memory.numpy().data
    for read in piece.reads:
        files[read.file].read_into(view[read.begin : read.begin + read.num_bytes], read.offset)
    for begin, end in piece.hashed:
        digest.update(view[begin:end])
    return memory


def tensor_in(memory: Tensor, begin: int, stored: StoredTensor) -> Tensor:
    """A tensor of a piece, as it is stored; a view."""
    entry = stored.entry
    dtype = TORCH_DTYPES[entry.dtype]
    flat = memory[begin : begin + prod(entry.shape) * dtype.itemsize].view(dtype)
    return flat.view(entry.shape)


def _aligned(end: int, stored: StoredTensor) -> int:
    item = TORCH_DTYPES[stored.entry.dtype].itemsize if stored.entry.dtype in TORCH_DTYPES else 1
    return end if end % item == 0 else -(-end // _ALIGNMENT) * _ALIGNMENT


def _piece(some: Sequence[tuple[StoredTensor, int]]) -> Piece:
    reads, hashed = list[Read](), list[tuple[int, int]]()
    for stored, begin in some:
        end = begin + stored.entry.num_bytes
        last = reads[-1] if reads else None
        follows = last is not None and (last.file, last.offset - last.begin) == (stored.file, stored.offset - begin)
        if last is not None and follows and last.begin + last.num_bytes == begin:
            reads[-1] = Read(last.file, last.offset, last.begin, end - last.begin)
        else:
            reads.append(Read(stored.file, stored.offset, begin, end - begin))
        if hashed and hashed[-1][1] == begin:
            hashed[-1] = (hashed[-1][0], end)
        else:
            hashed.append((begin, end))
    names = tuple(stored.entry.name for stored, _ in some)
    return Piece(tuple(reads), tuple(hashed), names, tuple(begin for _, begin in some), max(e for _, e in hashed))


class _Scratch(local):
    """A thread's own memory."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def of(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8. What is larger than a piece is not kept."""
        if num_bytes > PIECE_BYTES:
            return HostMemory(0).empty(num_bytes, dtype=torch.uint8)
        if self._memory is None:
            self._memory = HostMemory(0).empty(PIECE_BYTES, dtype=torch.uint8)  # its pages come when they are written
        return self._memory[:num_bytes]


_scratch = _Scratch()
