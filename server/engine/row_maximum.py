"""The first largest element of each row of bfloat16, by a numba kernel: what a greedy token costs.

torch compares bfloat16 one by one. Seen as whole numbers whose order is that of the values, 32 compare at once. Knows
no requests.
"""

import numpy as np
import torch
from numba import njit, types
from numba.np.numpy_support import carray
from torch import Tensor

from adapters.ops.bf16 import pointer
from adapters.ops.numba_kernels import OPTIONS, entry_point, kernel

NOT_FINITE = -1
"""In place of an id: the largest is infinite, or one is NaN."""

_INFINITY = 0x7F80  # the bits of it; of NaN, without the sign, they are more


@njit(**OPTIONS)
def _ordered(bits):  # type: ignore[no-untyped-def]
    """A number that rises with the value: of negative ones all bits but the sign are turned over. -0 is -1, 0 is 0."""
    return np.int16(bits ^ ((bits >> 15) & np.int16(0x7FFF)))


@njit(**OPTIONS)
def _largest(row):  # type: ignore[no-untyped-def]
    """row int16 [width], bits of bfloat16."""
    largest, magnitude = np.int16(-0x8000), np.int16(0)
    for i in range(row.shape[0]):
        largest = max(largest, _ordered(row[i]))
        magnitude = max(magnitude, np.int16(row[i] & np.int16(0x7FFF)))
    if magnitude > _INFINITY or largest >= _INFINITY or largest <= ~_INFINITY:
        return np.int64(NOT_FINITE)
    if largest == 0:  # -0 is as large
        largest = np.int16(-1)
    for i in range(row.shape[0]):
        if _ordered(row[i]) >= largest:
            return np.int64(i)
    return np.int64(NOT_FINITE)


@kernel()
def _largest_of_rows(ids_at, rows_at, num_rows, stride, width):  # type: ignore[no-untyped-def]
    ids = carray(pointer(ids_at), num_rows, np.int64)
    for row in range(num_rows):
        ids[row] = _largest(carray(pointer(rows_at + 2 * stride * row), width, np.int16))


_run = entry_point(_largest_of_rows, (types.int64,) * 5)


def serves(rows: Tensor) -> bool:
    """Whether `largest_ids` reads these."""
    return rows.dtype is torch.bfloat16 and rows.device.type == "cpu" and rows.ndim == 2 and rows.stride(1) == 1


def largest_ids(rows: Tensor) -> list[int]:
    """The index of the first largest element of each row [n, width], or NOT_FINITE."""
    ids = np.empty(len(rows), np.int64)
    _run(ids.ctypes.data, rows.data_ptr(), len(rows), rows.stride(0), rows.shape[1])
    found: list[int] = ids.tolist()
    return found
