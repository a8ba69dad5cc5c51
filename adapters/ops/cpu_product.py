"""Rows times a matrix on CPU: by the dot product where it fits, shared out among the threads; else in plain torch."""

import numpy as np
import torch
from torch import Tensor

from adapters.ops import cpu_product_kernels as kernels
from adapters.ops import reference_product
from adapters.ops.bf16_dot import LANES, ROWS_AT_ONCE, is_supported
from adapters.ops.thread_team import KernelArguments, current_team

_CHUNK = 1 << 16  # elements of the matrix a chunk reads, at least
_MIN_OUT = 256  # with fewer outputs a call is not worth its preparation


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [num_rows, in] · weight [out, in]ᵀ, float32 [num_rows, out]; both of one dtype."""
    if not _fits(x, weight):
        return reference_product.product(x, weight)
    x, (num_out, in_features) = x.contiguous(), weight.shape
    out = torch.empty(len(x), num_out)
    per_chunk = -(-_CHUNK // in_features // ROWS_AT_ONCE) * ROWS_AT_ONCE
    fields = (x.data_ptr(), len(x), in_features, weight.data_ptr(), num_out, out.data_ptr(), per_chunk)
    arguments = KernelArguments(np.array(fields, np.int64))
    current_team().run(kernels.multiply_rows_bf16.address, arguments, -(-num_out // per_chunk))
    return out


def _fits(x: Tensor, weight: Tensor) -> bool:
    """By what does not depend on how many rows there are."""
    is_bf16 = x.dtype is torch.bfloat16 and weight.dtype is torch.bfloat16
    is_large = len(weight) >= _MIN_OUT and weight.shape[1] % LANES == 0
    return is_bf16 and is_large and weight.is_contiguous() and is_supported()
