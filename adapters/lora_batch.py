"""Which adapters each token of a step uses, as a CSR list of pool row ranges. Plain integers and numpy, no torch.

For token t the adapters are the entries e in [indptr[t], indptr[t+1]): rows [starts[e], starts[e] + rank) of every
pool with weight weights[e], where rank is the rank the adapter has *in that module* (the pool knows; 0 = not
targeted). No entry = base, one = the usual, k = unmerged composition.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

TILE = 48
"""Tokens of a segment that are computed as one piece."""

RowRanges = tuple[tuple[int, float], ...]
"""The adapters of one request in one step: (first pool row, weight) each; empty = base."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of consecutive tokens [begin, end) that use one adapter with one weight."""

    begin: int
    end: int
    start: int
    weight: float


@dataclass(frozen=True)
class Tiles:
    """Runs of tokens that use one adapter, in pieces of a size to share out."""

    where: npt.NDArray[np.int64]  # [num_tiles, 3] first token, number of tokens, first pool row
    weights: npt.NDArray[np.float32]  # [num_tiles]

    @cached_property
    def addresses(self) -> tuple[int, int]:
        """Where both lie."""
        return self.where.ctypes.data, self.weights.ctypes.data


@dataclass(frozen=True)
class LoRABatch:
    """The adapters of one step. Requests with many tokens go to `segments` (matrix products), all other tokens
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

    @cached_property
    def tiles(self) -> Tiles:
        """The segments in pieces of at most TILE tokens."""
        pieces = [
            (begin, min(TILE, segment.end - begin), segment.start, segment.weight)
            for segment in self.segments
            for begin in range(segment.begin, segment.end, TILE)
        ]
        where = np.array([piece[:3] for piece in pieces], dtype=np.int64).reshape(-1, 3)
        return Tiles(where, np.array([piece[3] for piece in pieces], dtype=np.float32))

    @classmethod
    def build(
        cls,
        token_counts: Sequence[int],
        ranges: Sequence[RowRanges],
        *,
        min_segment: int = 1,
        is_prompt: Sequence[bool] | None = None,
    ) -> "LoRABatch | None":
        """Pack the step's requests, in batch order: request i has token_counts[i] tokens using ranges[i].

        A request of one adapter with at least `min_segment` tokens is a segment, unless `is_prompt` says it is none.
        None when no token uses an adapter, so that a base-only step runs no LoRA code.
        """
        if min_segment < 1:
            raise ValueError(f"min_segment is {min_segment}; a segment has at least one token")
        num_entries = [len(request) for request in ranges]
        if not any(num_entries):
            return None
        counts = np.asarray(token_counts, dtype=np.int64)  # [num_requests]
        entries = np.asarray(num_entries, dtype=np.int64)  # [num_requests]
        token_entries = np.repeat(entries, counts)  # [num_tokens]
        indptr = np.zeros(len(token_entries) + 1, dtype=np.int32)
        np.cumsum(token_entries, out=indptr[1:])
        if indptr[-1] == 0:
            return None
        # Entry e of token t is entry e - indptr[t] of its request, whose entries begin at first[request].
        first = np.cumsum(entries) - entries  # [num_requests]
        source = np.arange(indptr[-1]) + np.repeat(np.repeat(first, counts) - indptr[:-1], token_entries)  # [nnz]
        flat = [entry for request in ranges for entry in request]
        segments = _segments(token_counts, ranges, min_segment, is_prompt or [True] * len(ranges))
        in_rows = token_entries > 0  # [num_tokens]
        for segment in segments:
            in_rows[segment.begin : segment.end] = False
        return cls(
            indptr=indptr,
            starts=np.asarray([start for start, _ in flat], dtype=np.int32)[source],
            weights=np.asarray([weight for _, weight in flat], dtype=np.float32)[source],
            rows=np.flatnonzero(in_rows).astype(np.int32),
            segments=segments,
        )


def _segments(
    token_counts: Sequence[int], ranges: Sequence[RowRanges], min_segment: int, is_prompt: Sequence[bool]
) -> tuple[Segment, ...]:
    """The requests of one adapter with at least `min_segment` tokens of prompt.

    Neighbours with the same adapter stay apart: which kernel serves a token, and how it rounds, is then a matter of its
    own request alone.
    """
    found: list[Segment] = []
    begin = 0
    for count, request, may_be in zip(token_counts, ranges, is_prompt, strict=True):
        if may_be and len(request) == 1 and count >= min_segment:
            found.append(Segment(begin, begin + count, *request[0]))
        begin += count
    return tuple(found)
