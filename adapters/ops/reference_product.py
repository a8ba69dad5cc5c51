"""Rows times a matrix in plain torch, for rows whose bits are to depend on nothing but the row: the oracle."""

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 8  # rows that are multiplied at once


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [num_rows, in] · weight [out, in]ᵀ, float32 [num_rows, out]; both of one dtype.

    As many rows at once however many there are, since torch's sums depend on that.
    """
    num_rows = len(x)
    padded = x.new_zeros(-(-num_rows // _BLOCK) * _BLOCK, x.shape[1])
    padded[:num_rows] = x
    out = x.new_empty(num_rows, len(weight), dtype=torch.float32)
    for begin in range(0, num_rows, _BLOCK):
        some = out[begin : begin + _BLOCK]
        some.copy_(functional.linear(padded[begin : begin + _BLOCK], weight)[: len(some)])
    return out
