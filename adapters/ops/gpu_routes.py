"""Which of the two GPU routes each token of a step takes: a row of its own, or a tile with its neighbours. numpy only.

Runs of at least MIN_TILE_RUN neighbouring tokens with one adapter and one weight are cut into tiles; every other token
with an adapter is a row. A bucket of decode rows asks for no tiles: then a row's sums, and so its bits, do not depend
on what its neighbours use.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters.lora_batch import LoRABatch
from adapters.ops.gpu_blocks import BLOCK_M

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

MIN_TILE_RUN = 16
"""Fewer neighbouring tokens of one adapter are rows: a tile would leave more than three quarters of itself empty."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routes:
    """A step's tokens with adapters, each in exactly one of rows and tiles."""

    row_tokens: Ints  # [num_rows]
    row_indptr: Ints  # [num_rows + 1] row i has the entries [row_indptr[i], row_indptr[i + 1])
    entry_starts: Ints  # [num_entries] first pool row
    entry_weights: Floats  # [num_entries]
    tile_begins: Ints  # [num_tiles] first token
    tile_lengths: Ints  # [num_tiles] 1 .. BLOCK_M tokens
    tile_starts: Ints  # [num_tiles] first pool row
    tile_weights: Floats  # [num_tiles]

    @property
    def num_rows(self) -> int:
        return len(self.row_tokens)

    @property
    def num_entries(self) -> int:
        return len(self.entry_starts)

    @property
    def num_tiles(self) -> int:
        return len(self.tile_begins)


def route(batch: LoRABatch, *, with_tiles: bool) -> Routes:
    """Divide the batch's tokens; all of them are rows unless `with_tiles`."""
    counts = np.diff(batch.indptr)  # [num_tokens] entries of each
    is_row = counts > 0  # [num_tokens]
    begins = lengths = np.zeros(0, np.int32)
    if with_tiles and len(batch.starts):
        begins, lengths = _runs(batch, counts)
        is_long = (counts[begins] == 1) & (lengths >= MIN_TILE_RUN)
        is_row &= ~np.repeat(is_long, lengths)
        begins, lengths = _cut(begins[is_long], lengths[is_long])
    tile_entries = batch.indptr[begins]  # [num_tiles]
    rows = np.flatnonzero(is_row).astype(np.int32)
    row_indptr, entries = _gather(batch.indptr[rows], counts[rows])
    return Routes(
        row_tokens=rows,
        row_indptr=row_indptr,
        entry_starts=batch.starts[entries],
        entry_weights=batch.weights[entries],
        tile_begins=begins,
        tile_lengths=lengths,
        tile_starts=batch.starts[tile_entries],
        tile_weights=batch.weights[tile_entries],
    )


def _runs(batch: LoRABatch, counts: Ints) -> tuple[Ints, Ints]:
    """First token and length of each run of tokens with the same single entry; any other token is a run of itself."""
    entries = np.minimum(batch.indptr[:-1], len(batch.starts) - 1)  # [num_tokens] the first; any for base tokens
    starts, weights = batch.starts[entries], batch.weights[entries]
    continues = (counts[1:] == 1) & (counts[:-1] == 1) & (starts[1:] == starts[:-1]) & (weights[1:] == weights[:-1])
    begins = np.flatnonzero(np.concatenate(([True], ~continues))).astype(np.int32)
    return begins, np.diff(begins, append=np.int32(len(counts)))


def _cut(begins: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """Runs cut into tiles of BLOCK_M tokens, the last of each run perhaps shorter."""
    num_tiles = -(-lengths // BLOCK_M)  # [num_runs]
    first_tiles = np.cumsum(num_tiles) - num_tiles  # [num_runs]
    offsets = (np.arange(num_tiles.sum()) - np.repeat(first_tiles, num_tiles)) * BLOCK_M  # [num_tiles] within the run
    tile_lengths = np.minimum(np.repeat(lengths, num_tiles) - offsets, BLOCK_M)
    return (np.repeat(begins, num_tiles) + offsets).astype(np.int32), tile_lengths.astype(np.int32)


def _gather(firsts: Ints, counts: Ints) -> tuple[Ints, npt.NDArray[np.int64]]:
    """The ranges [first, first + count) end to end: their boundaries [num_rows + 1] and their members."""
    indptr = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=indptr[1:])
    return indptr, np.arange(indptr[-1], dtype=np.int64) + np.repeat(firsts - indptr[:-1], counts)
