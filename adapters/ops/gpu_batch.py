"""How a LoRABatch lies on the device: int32 fields of one buffer, written whole each step, and the workspace beside it.

Capacities (`LoRACaps`) belong to the buffer, not to the step: `fill` writes every word of every field, the unused tail
as rows without entries and tiles of length 0, so that a graph captured over the buffer never meets a step that is past.
Needs no Triton.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.lora_batch import LoRABatch
from adapters.ops.gpu_blocks import BLOCK_M, BLOCK_R, MAX_ROW_PARTIALS, MAX_TILE_PARTIALS
from adapters.ops.gpu_routes import Ints, Routes, route

_ALIGNMENT = 4  # words: every field begins on 16 bytes when the buffer does


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRACaps:
    """What one buffer can hold. Without tiles every token is a row, whatever its neighbours use."""

    num_tokens: int  # of x and y, exactly: the forward pass is padded to it
    num_rows: int
    num_entries: int  # of all rows together
    num_tiles: int
    max_rank: int  # of any adapter in the pools

    @classmethod
    def decode(cls, num_rows: int, *, max_rank: int) -> "LoRACaps":
        """Of a bucket of num_rows tokens with as many entries, all of them rows."""
        return cls(num_tokens=num_rows, num_rows=num_rows, num_entries=num_rows, num_tiles=0, max_rank=max_rank)

    @classmethod
    def exact(cls, batch: LoRABatch, routes: Routes, *, max_rank: int) -> "LoRACaps":
        """The least that holds one batch."""
        return cls(
            num_tokens=batch.num_tokens,
            num_rows=routes.num_rows,
            num_entries=routes.num_entries,
            num_tiles=routes.num_tiles,
            max_rank=max_rank,
        )

    @property
    def padded_rank(self) -> int:
        return _round_up(self.max_rank, BLOCK_R)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GPULoRABatch:
    """The fields on the device, and room for the partial sums of one group at a time: groups run one after another."""

    caps: LoRACaps
    row_tokens: Tensor  # int32 [num_rows]
    row_indptr: Tensor  # int32 [num_rows + 1]
    entry_starts: Tensor  # int32 [num_entries]
    entry_weights: Tensor  # float32 [num_entries]
    tile_begins: Tensor  # int32 [num_tiles]
    tile_lengths: Tensor  # int32 [num_tiles]
    tile_starts: Tensor  # int32 [num_tiles]
    tile_weights: Tensor  # float32 [num_tiles]
    workspace: Tensor  # float32, at least workspace_size(caps)


def layout(caps: LoRACaps) -> dict[str, int]:
    """Field → number of int32 words."""
    words = {
        "row_tokens": caps.num_rows,
        "row_indptr": caps.num_rows + 1,
        "entry_starts": caps.num_entries,
        "entry_weights": caps.num_entries,
        "tile_begins": caps.num_tiles,
        "tile_lengths": caps.num_tiles,
        "tile_starts": caps.num_tiles,
        "tile_weights": caps.num_tiles,
    }
    return {name: _round_up(count, _ALIGNMENT) for name, count in words.items()}


def workspace_size(caps: LoRACaps) -> int:
    """float32 elements for the partial sums of any group; rows are done with theirs before tiles begin."""
    rows, tiles = caps.num_entries * MAX_ROW_PARTIALS, caps.num_tiles * BLOCK_M * MAX_TILE_PARTIALS
    return max(rows, tiles) * caps.padded_rank


def fits(batch: LoRABatch | None, caps: LoRACaps) -> bool:
    """Whether `fill` would take the batch."""
    return batch is None or _holds(caps, batch, route(batch, with_tiles=caps.num_tiles > 0))


def fill(views: Mapping[str, Ints], batch: LoRABatch | None, caps: LoRACaps) -> None:
    """Write all of every field; None is a step of base rows only. ValueError when the batch is over `caps`."""
    if batch is None:
        for view in views.values():
            view[:] = 0
        return
    routes = route(batch, with_tiles=caps.num_tiles > 0)
    if not _holds(caps, batch, routes):
        raise ValueError(_over(batch, routes, caps))
    _write(views, routes)


def from_device(views: Mapping[str, Tensor], caps: LoRACaps, *, workspace: Tensor | None = None) -> GPULoRABatch:
    """The batch over device views of the fields. Buckets that never run at once may share the largest's workspace."""
    size = workspace_size(caps)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=views["row_tokens"].device)
    if workspace.numel() < size:
        raise ValueError(f"a workspace of {workspace.numel()} elements is under the {size} that {caps} needs")
    weights = {name: views[name].view(torch.float32) for name in ("entry_weights", "tile_weights")}
    return GPULoRABatch(caps=caps, workspace=workspace, **{**views, **weights})


class LoRAStaging:
    """The functions above for steps that run one at a time: all their batches share one workspace.

    A step that fits no bucket takes tiles only where its batch has segments, which a step of decode rows does not: its
    rows get the bits that they would get in a bucket.
    """

    def __init__(self, *, max_rank: int) -> None:
        self._max_rank = max_rank
        self._workspace = torch.empty(0)

    def bucket(self, num_rows: int) -> LoRACaps:
        return LoRACaps.decode(num_rows, max_rank=self._max_rank)

    def exact(self, batch: LoRABatch) -> LoRACaps:
        return LoRACaps.exact(batch, route(batch, with_tiles=bool(batch.segments)), max_rank=self._max_rank)

    def fits(self, batch: LoRABatch, caps: LoRACaps) -> bool:
        return fits(batch, caps)

    def layout(self, caps: LoRACaps) -> dict[str, int]:
        return layout(caps)

    def fill(self, views: Mapping[str, Ints], batch: LoRABatch, caps: LoRACaps) -> None:
        fill(views, batch, caps)

    def from_device(self, views: Mapping[str, Tensor], caps: LoRACaps) -> GPULoRABatch:
        """What a graph was captured with stays alive in its batch, also when a larger workspace follows."""
        size, device = workspace_size(caps), views["row_tokens"].device
        if self._workspace.numel() < size or self._workspace.device != device:
            self._workspace = torch.empty(size, dtype=torch.float32, device=device)
        return from_device(views, caps, workspace=self._workspace)

    def stage(self, batch: LoRABatch, device: torch.device) -> GPULoRABatch:
        """A batch of its own size, in a buffer and a copy of its own."""
        caps = self.exact(batch)
        words = layout(caps)
        buffer = torch.empty(sum(words.values()), dtype=torch.int32, pin_memory=device.type == "cuda")
        fill({name: part.numpy() for name, part in _split(buffer, words).items()}, batch, caps)
        return self.from_device(_split(buffer.to(device, non_blocking=True), words), caps)


def _write(views: Mapping[str, Ints], routes: Routes) -> None:
    """Every word of every view: the values, then zeros; row_indptr stays at its last value."""
    values = (
        ("row_tokens", routes.row_tokens),
        ("row_indptr", routes.row_indptr),
        ("entry_starts", routes.entry_starts),
        ("entry_weights", routes.entry_weights.view(np.int32)),
        ("tile_begins", routes.tile_begins),
        ("tile_lengths", routes.tile_lengths),
        ("tile_starts", routes.tile_starts),
        ("tile_weights", routes.tile_weights.view(np.int32)),
    )
    for name, value in values:
        views[name][: len(value)] = value
        views[name][len(value) :] = routes.row_indptr[-1] if name == "row_indptr" else 0


def _holds(caps: LoRACaps, batch: LoRABatch, routes: Routes) -> bool:
    return (
        batch.num_tokens <= caps.num_tokens
        and routes.num_rows <= caps.num_rows
        and routes.num_entries <= caps.num_entries
        and routes.num_tiles <= caps.num_tiles
    )


def _over(batch: LoRABatch, routes: Routes, caps: LoRACaps) -> str:
    return (
        f"a LoRA batch of {batch.num_tokens} tokens, {routes.num_rows} rows, {routes.num_entries} entries and "
        f"{routes.num_tiles} tiles is over {caps}: take a larger bucket"
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _split(buffer: Tensor, words: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(words, buffer.split(list(words.values())), strict=True))
