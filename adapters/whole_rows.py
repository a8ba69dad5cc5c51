"""A whole embedding or head that an adapter brings, compared with the base's: equal, a few other rows, or another one.

PEFT saves full copies beside pairs on embeddings, most of them as the base has them. Knows nothing of names or limits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter_extras import TokenRows
from adapters.base_weights import BaseWeights

_AT_ONCE = 1 << 21  # elements compared together
_FEW = 4  # rows are kept by themselves while they are at most a fourth of all


@dataclass(frozen=True, slots=True)
class Compared:
    """`rows`: those that differ or that the base does not have, None: none or too many; `weight`: all, if too many."""

    rows: TokenRows | None
    weight: Tensor | None

    @property
    def is_equal(self) -> bool:
        return self.rows is None and self.weight is None


def compare(weights: BaseWeights, parameter: str, stored: Tensor) -> Compared:
    """`stored` [V', hidden], in the compute dtype, against the base's [V, hidden]. Rows past the base's are always rows
    of their own; rows that the base has and `stored` has not say nothing.
    """
    shape = weights.shape(parameter)
    if shape is None or shape[1:] != stored.shape[1:]:
        raise ValueError(f"{parameter} of {tuple(stored.shape)} meets a base of {shape}")
    shared = min(shape[0], stored.shape[0])
    at_once = max(1, _AT_ONCE // stored.shape[1])
    differing = [torch.arange(shared, stored.shape[0])]
    for begin in range(0, shared, at_once):
        end = min(begin + at_once, shared)
        same = (stored[begin:end].float() == weights.rows(parameter, begin, end)).all(1)  # [n]
        differing.append(begin + (~same).nonzero().flatten())
    ids = torch.cat(differing).sort().values  # [n] int64
    if not len(ids):
        return Compared(None, None)
    if len(ids) * _FEW > stored.shape[0]:
        return Compared(None, stored)
    return Compared(TokenRows(ids, stored[ids]), None)
