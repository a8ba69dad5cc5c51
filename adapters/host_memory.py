"""Large tensors of the CPU, side by side in mappings of their own, backed by huge pages where the system has them.

What is read once a step, hundreds of megabytes of it, costs an address translation for every page: of 4 KiB each, more
than the processor keeps. And what is given back is given back to the system, whole, not to a heap that keeps it. Knows
nothing of what the tensors hold.
"""

import mmap
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_BLOCK = 64 << 20  # bytes; huge pages have 2 MiB
ALIGNMENT = 128
"""Bytes: two cache lines. Where a tensor begins."""


class HostMemory:
    """Gives out tensors that live as long as anybody holds them; a block is given back when all of its are gone.

    `block_bytes`: of a block, unless a tensor needs a larger one.
    """

    def __init__(self, block_bytes: int = _BLOCK) -> None:
        self._block_bytes = block_bytes
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    @staticmethod
    def taken(num_bytes: int) -> int:
        """Bytes of a block that a tensor takes."""
        return -(-num_bytes // ALIGNMENT) * ALIGNMENT

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros, whose pages are there once they are written."""
        num_bytes = prod(shape) * dtype.itemsize
        taken = self.taken(num_bytes)
        if self._used + taken > len(self._block):
            self._block, self._used = _map(max(self._block_bytes, taken)), 0
        place = self._block[self._used : self._used + num_bytes]
        self._used += taken
        return place.view(dtype).view(shape)

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy."""
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _map(num_bytes: int) -> Tensor:
    # Private: what may be shared with other processes never has huge pages.
    block = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)
