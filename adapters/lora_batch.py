"""Which adapters each token of a step uses, as a CSR list of pool row ranges. Plain integers and numpy, no torch.

For token t the adapters are the entries e in [indptr[t], indptr[t+1]): rows [starts[e], starts[e] + rank) of every
pool with weight weights[e], where rank is the rank the adapter has *in that module* (the pool knows; 0 = not
targeted). No entry = base, one = the usual, k = unmerged composition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RowRanges = tuple[tuple[int, float], ...]
"""The adapters of one request in one step: (first pool row, weight) each; empty = base."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of consecutive tokens [begin, end) that use one adapter with one weight."""

    begin: int
    end: int
    start: int
    weight: float


@dataclass(frozen=True, slots=True)
class LoRABatch:
    """The adapters of one step. Long runs of one adapter go to `segments` (matrix products), all other tokens
    with an adapter to `rows` (the row kernel). A token is in exactly one of the two, base tokens in neither.
    """

    indptr: npt.NDArray[np.int32]  # [num_tokens + 1]
    starts: npt.NDArray[np.int32]  # [nnz]
    weights: npt.NDArray[np.float32]  # [nnz]
    rows: npt.NDArray[np.int32]  # [num_row_tokens] token indices served by the row kernel
    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.indptr) - 1

    @classmethod
    def build(cls, token_counts: Sequence[int], ranges: Sequence[RowRanges], *, min_segment: int) -> "LoRABatch | None":
        """Pack the step's requests, in batch order: request i has token_counts[i] tokens using ranges[i].

        Neighbouring requests with equal single ranges join into one segment when their tokens together number
        at least `min_segment`. None when no token uses an adapter, so that a base-only step runs no LoRA code.
        """
        raise NotImplementedError
