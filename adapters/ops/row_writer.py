"""Copies an adapter into the CPU's pools: some 420 pieces of a flat tensor, in one call of the thread team.

One by one in Python they took five times as long as the bytes themselves. Where dtypes differ, the reference converts.
"""

from collections.abc import Sequence

import numpy as np
from numba import types
from torch import Tensor

from adapters.ops import reference
from adapters.ops.atomics import load
from adapters.ops.chunk_kernel import chunk_kernel
from adapters.ops.interface import RowTarget
from adapters.ops.numba_kernels import OPTIONS
from adapters.ops.thread_team import KernelArguments, current_team

_FIELDS = 3  # of a piece: to which address, from which, how many bytes
_memcpy = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))


@chunk_kernel(**OPTIONS)
def copy_piece(arguments, chunk):  # type: ignore[no-untyped-def]
    at = arguments + 8 * _FIELDS * chunk
    _memcpy(load(at), load(at + 8), load(at + 16))


class CPURowWriter:
    """The pieces of all adapters of one layout, which differ in their first pool row and where their tensor lies."""

    def __init__(self, targets: Sequence[RowTarget]) -> None:
        self._reference = reference.row_writer(targets)
        self._dtypes = {target.pool.dtype for target in targets}
        row_bytes = [target.pool.stride(0) * target.pool.element_size() for target in targets]
        pieces = [
            (target.pool.data_ptr(), target.begin * target.pool.element_size(), target.num_rows * num_bytes)
            for target, num_bytes in zip(targets, row_bytes, strict=True)
        ]
        self._pieces = np.array(pieces, np.int64).reshape(-1, _FIELDS)  # [num_targets, 3], for row 0 and address 0
        self._row_bytes = np.array(row_bytes, np.int64)  # [num_targets]

    def write(self, flat: Tensor, start: int) -> None:
        if self._dtypes != {flat.dtype}:
            self._reference.write(flat, start)
            return
        pieces = self._pieces.copy()
        pieces[:, 0] += start * self._row_bytes
        pieces[:, 1] += flat.data_ptr()
        team = current_team()
        with team.step():
            team.run(copy_piece.address, KernelArguments(pieces.reshape(-1)), len(pieces))
