"""Memory for the tensors of one forward pass, given out at the same places whenever the pass makes the same tensors.

A tensor's place is free again when nobody holds the tensor or a view of it, so a pass takes what it needs at its
widest. Only bookkeeping: what lies at a place after that is nobody's concern.
"""

import weakref
from collections import defaultdict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 128  # bytes: two cache lines
_BLOCK = 16 << 20


class TensorArena:
    """Grows by whole blocks, which stay where they are."""

    def __init__(self) -> None:
        self._blocks: list[npt.NDArray[np.uint8]] = []
        self.clear()

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self._blocks))

    def clear(self) -> None:
        """Begin from the first place again, whatever is still held."""
        self._round = object()  # first: places of the pass before may come back at any moment
        self._used: list[int] = [0] * len(self._blocks)  # bytes of each block
        self._free: defaultdict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)  # places by size

    def like(self, tensor: Tensor) -> Tensor:
        """An empty tensor with the shape, strides and dtype of `tensor`."""
        place = self._take(-(-_num_bytes(tensor) // _ALIGNMENT) * _ALIGNMENT)
        held = place[:]  # an object of its own, which lives as long as the tensor's memory is held
        weakref.finalize(held, self._give_back, self._round, place).atexit = False
        flat = torch.from_numpy(held).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride())

    def view(self, tensor: Tensor) -> Tensor:
        """The memory of `tensor` as a tensor that does not keep its place; itself when it lies elsewhere."""
        address = tensor.data_ptr() if tensor.layout is torch.strided else 0
        for block in self._blocks:
            begin = block.ctypes.data
            if begin <= address < begin + len(block):
                flat = torch.from_numpy(block)[address - begin :]
                flat = flat[: len(flat) // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
                return flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset())
        return tensor

    def _take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        if self._free[num_bytes]:
            return self._free[num_bytes].pop()
        for number, block in enumerate(self._blocks):
            begin = self._used[number]
            if begin + num_bytes <= len(block):
                self._used[number] += num_bytes
                return block[begin : begin + num_bytes]
        raw = np.empty(max(_BLOCK, num_bytes) + _ALIGNMENT, np.uint8)  # not zeros: untouched pages take no memory
        skipped = -raw.ctypes.data % _ALIGNMENT
        self._blocks.append(raw[skipped : len(raw) - _ALIGNMENT + skipped])
        self._used.append(0)
        return self._take(num_bytes)

    def _give_back(self, round_: object, place: npt.NDArray[np.uint8]) -> None:
        if round_ is self._round:  # places of a pass before belong to nobody
            self._free[len(place)].append(place)


def _num_bytes(tensor: Tensor) -> int:
    """From the first element to the last, one element at least."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size)
    return (last + 1) * tensor.itemsize
