"""e^x for numba kernels, in a form that LLVM vectorises, which libm's is not."""

# mypy: disallow-untyped-decorators=False
# numba's decorators are untyped and would make every kernel an error.

from typing import Any

import numpy as np
from numba import njit

from adapters.ops.bf16 import widen

EXACT: dict[str, Any] = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy", "nogil": True}
"""How kernels with sums of exponentials are compiled. No "nnan" and no "ninf": a row with broken numbers must come out
as NaN, not as a plausible number."""

_LOG2_E = np.float32(1.4426950408889634)
# 2^f on (-1, 0], weighted least squares at Chebyshev nodes: relative error 7.5e-8 before float32's own.
_C0, _C1, _C2 = np.float32(0.99999994), np.float32(0.69314224), np.float32(0.24017219)
_C3, _C4, _C5 = np.float32(0.055279724), np.float32(0.0091886120), np.float32(0.00093878829)


@njit(inline="always", **EXACT)
def exp(x: Any) -> Any:
    """e^x for x <= 0, as 2^n · 2^f with whole n and f in (-1, 0].

    Below 2^-126 it stays at 2^-126: beside the weight 1 of the largest score that is nothing.
    """
    t = max(x * _LOG2_E, np.float32(-126.0))
    n = np.int32(t)
    f = t - np.float32(n)
    two_to_f = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * _C5))))
    return two_to_f * widen(np.uint16((n + 127) << 7))  # the bits of 2^n as bf16: an exponent and nothing else
