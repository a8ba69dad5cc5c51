"""How a step's attention metadata lies on the device: int32 fields of one buffer, written whole each step.

A row takes one of two routes. The leading rows with one new token each are decode rows, split over their context; all
others are cut into tiles of up to TILE_QUERIES tokens. Capacities belong to the buffer, not to the step: `fill` writes
every word of every field, what lies past the step as padding tokens, rows without context and tiles without queries.
Needs no Triton and knows no layer: nothing here depends on heads, dims or windows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.engine.attention.interface import AttentionMetadata

Ints = npt.NDArray[np.int32]

TILE_QUERIES = 128
"""New tokens of one tile; a kernel divides it further when many query heads share a KV head."""


class StepCaps(Protocol):
    """What one buffer can hold; the caps of a whole step (device_step.py) are one."""

    @property
    def num_tokens(self) -> int: ...  # of q, exactly: the forward pass is padded to it
    @property
    def num_rows(self) -> int: ...
    @property
    def max_blocks(self) -> int: ...  # of one row's block table
    @property
    def is_decode(self) -> bool: ...  # every row has one new token


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCaps:
    """StepCaps for attention alone."""

    num_tokens: int
    num_rows: int
    max_blocks: int
    is_decode: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GPUAttentionBatch:
    """The fields on the device."""

    caps: StepCaps
    slot_mapping: Tensor  # int32 [num_tokens] where each token's K and V go, -1 = padding
    decode_lens: Tensor  # int32 [num_rows] context of decode row t, whose one new token is token t; 0 = nothing
    block_tables: Tensor  # int32 [num_rows, max_blocks]
    tile_rows: Tensor  # int32 [num_tiles]
    tile_tokens: Tensor  # int32 [num_tiles] first token in the packed batch
    tile_positions: Tensor  # int32 [num_tiles] its position in the row
    tile_lens: Tensor  # int32 [num_tiles] tokens, 0 = nothing


@dataclass(frozen=True, slots=True)
class _Tiles:
    """[num_tiles] each; see GPUAttentionBatch."""

    rows: Ints
    tokens: Ints
    positions: Ints
    lens: Ints


def num_tiles(caps: StepCaps) -> int:
    """As many as num_tokens can make: full ones, and a last one for each row."""
    if caps.is_decode:
        return 0
    return min(caps.num_rows, caps.num_tokens) + caps.num_tokens // TILE_QUERIES


def layout(caps: StepCaps) -> dict[str, int]:
    """Field → number of int32 words."""
    tiles = dict.fromkeys(("tile_rows", "tile_tokens", "tile_positions", "tile_lens"), num_tiles(caps))
    return {
        "slot_mapping": caps.num_tokens,
        "decode_lens": caps.num_rows,
        "block_tables": caps.num_rows * caps.max_blocks,
        **tiles,
    }


def fill(views: Mapping[str, Ints], batch: AttentionMetadata, caps: StepCaps) -> None:
    """Write all of every field. ValueError when the batch is over `caps`."""
    _check(batch, caps)
    num_rows, num_blocks = batch.block_tables.shape
    tiles = _tiles(batch)
    tables = views["block_tables"].reshape(caps.num_rows, caps.max_blocks)
    tables[num_rows:] = 0
    tables[:num_rows, :num_blocks] = batch.block_tables
    tables[:num_rows, num_blocks:] = 0
    for name, values, nothing in (
        ("slot_mapping", batch.slot_mapping, -1),
        ("decode_lens", batch.context_lens[: batch.num_decode_rows], 0),
        ("tile_rows", tiles.rows, 0),
        ("tile_tokens", tiles.tokens, 0),
        ("tile_positions", tiles.positions, 0),
        ("tile_lens", tiles.lens, 0),
    ):
        views[name][: len(values)] = values
        views[name][len(values) :] = nothing


def from_device(views: Mapping[str, Tensor], caps: StepCaps) -> GPUAttentionBatch:
    """The batch over device views of the fields."""
    tables = views["block_tables"].view(caps.num_rows, caps.max_blocks)
    return GPUAttentionBatch(caps=caps, **{**views, "block_tables": tables})


def stage(batch: AttentionMetadata, device: torch.device) -> GPUAttentionBatch:
    """A batch of its own size, copied by itself: for steps outside any bucket."""
    num_rows, max_blocks = batch.block_tables.shape
    caps = AttentionCaps(
        num_tokens=len(batch.slot_mapping),
        num_rows=num_rows,
        max_blocks=max_blocks,
        is_decode=batch.num_decode_rows == num_rows,
    )
    words = layout(caps)
    buffer = torch.empty(sum(words.values()), dtype=torch.int32, pin_memory=device.type == "cuda")
    sizes = list(words.values())
    fill(dict(zip(words, (part.numpy() for part in buffer.split(sizes)), strict=True)), batch, caps)
    on_device = buffer.to(device, non_blocking=True).split(sizes)
    return from_device(dict(zip(words, on_device, strict=True)), caps)


def _tiles(batch: AttentionMetadata) -> _Tiles:
    """Every row that is no decode row, cut every TILE_QUERIES tokens from its own first new one."""
    begins, ends = batch.query_starts[:-1], batch.query_starts[1:]
    lens = (ends - begins)[batch.num_decode_rows :]
    counts = -(-lens // TILE_QUERIES)
    row = np.repeat(np.arange(batch.num_decode_rows, len(begins), dtype=np.int32), counts)
    first_tile = np.cumsum(counts) - counts
    offset = (np.arange(len(row)) - np.repeat(first_tile, counts)) * TILE_QUERIES
    left = (ends - begins)[row] - offset
    history = (batch.context_lens - (ends - begins))[row]
    fields = row, begins[row] + offset, history + offset, np.minimum(left, TILE_QUERIES)
    return _Tiles(*(field.astype(np.int32) for field in fields))


def _check(batch: AttentionMetadata, caps: StepCaps) -> None:
    num_rows, num_blocks = batch.block_tables.shape
    num_tokens = len(batch.slot_mapping)
    if num_tokens > caps.num_tokens or num_rows > caps.num_rows or num_blocks > caps.max_blocks:
        raise ValueError(
            f"a step of {num_tokens} tokens in {num_rows} rows of {num_blocks} blocks is over {caps}: "
            "take a larger bucket"
        )
    if caps.is_decode and batch.num_decode_rows != num_rows:
        raise ValueError(
            f"{num_rows - batch.num_decode_rows} of {num_rows} rows have several new tokens, and {caps} has no tiles: "
            "take a bucket that is not for decode alone"
        )
