"""What loading an adapter may ask of the base's weights, and DoRA's gains made from them. Read only.

Knows nothing of how a model holds its weights: `BaseWeights` is what whoever holds them gives.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_AT_ONCE = 1 << 20  # elements of a weight that are looked at together: 4 MiB in float32


class BaseWeights(Protocol):
    """May be called in any thread, while the model computes."""

    @property
    def fingerprint(self) -> str:
        """Which weights they are, so that what is computed from them is not used with others."""

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """[out, in] of a linear or embedding, whichever way round it is stored, [n] of a vector; None: no such one."""

    def rows(self, parameter: str, begin: int, end: int) -> Tensor:
        """[end - begin, in] or [end - begin] float32 on the CPU, what the compute dtype holds exactly."""


def dora_gain(
    weights: BaseWeights,
    parameter: str,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    on_rows: Callable[[int], object] = lambda num_rows: None,
) -> Tensor:
    """g [out] = magnitude / ‖W + B·A‖₂ by output, float32.

    A is [r, in] and B is [out, r], float32, the scale in B. `on_rows` is told of rows that are done. Where the norm and
    the magnitude are both zero, the gain is one: the output is zero either way. Source: PEFT 0.21, tuners/lora/dora.py.
    """
    num_rows, width = lora_b.shape[0], lora_a.shape[1]
    at_once = max(1, _AT_ONCE // width)
    norms = torch.empty(num_rows)
    for begin in range(0, num_rows, at_once):
        end = min(begin + at_once, num_rows)
        adapted = weights.rows(parameter, begin, end).addmm(lora_b[begin:end], lora_a)  # [n, in]
        norms[begin:end] = torch.linalg.vector_norm(adapted, dim=1)
        on_rows(end - begin)
    return _quotient(magnitude, norms)


def embedding_dora_gain(
    weights: BaseWeights,
    parameter: str,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    on_rows: Callable[[int], object] = lambda num_rows: None,
) -> Tensor:
    """g [hidden] = magnitude / ‖E + A·B‖₂ by hidden element, over the vocabulary; A [V, r], B [r, hidden], float32."""
    num_rows, width = lora_a.shape[0], lora_b.shape[1]
    at_once = max(1, _AT_ONCE // width)
    squares = torch.zeros(width, dtype=torch.float64)
    for begin in range(0, num_rows, at_once):
        end = min(begin + at_once, num_rows)
        adapted = weights.rows(parameter, begin, end).addmm(lora_a[begin:end], lora_b)  # [n, hidden]
        squares += adapted.double().square().sum(0)
        on_rows(end - begin)
    return _quotient(magnitude, squares.sqrt().float())


def _quotient(magnitude: Tensor, norms: Tensor) -> Tensor:
    gain = magnitude.float() / norms
    return torch.where((norms == 0) & (magnitude == 0), torch.ones_like(gain), gain)
