"""What loading an adapter may ask of the base's weights, and DoRA's gains made from them. Read only.

Knows nothing of how a model holds its weights: `BaseWeights` is what whoever holds them gives.
"""

from collections.abc import Callable, Iterator
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
    norms = []
    for adapted in _adapted(weights, parameter, lora_b, lora_a):  # [n, in]
        norms.append(torch.linalg.vector_norm(adapted, dim=1))
        on_rows(len(adapted))
    return _quotient(magnitude, torch.cat(norms))


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
    squares = torch.zeros(lora_b.shape[1], dtype=torch.float64)
    for adapted in _adapted(weights, parameter, lora_a, lora_b):  # [n, hidden]
        squares += adapted.double().square().sum(0)
        on_rows(len(adapted))
    return _quotient(magnitude, squares.sqrt().float())


def _adapted(weights: BaseWeights, parameter: str, left: Tensor, right: Tensor) -> Iterator[Tensor]:
    """W + left · right [num_rows, width], some rows at a time; left [num_rows, r], right [r, width]."""
    num_rows, width = left.shape[0], right.shape[1]
    at_once = max(1, _AT_ONCE // width)
    for begin in range(0, num_rows, at_once):
        end = min(begin + at_once, num_rows)
        yield weights.rows(parameter, begin, end).addmm(left[begin:end], right)


def _quotient(magnitude: Tensor, norms: Tensor) -> Tensor:
    gain = magnitude.float() / norms
    return torch.where((norms == 0) & (magnitude == 0), torch.ones_like(gain), gain)
