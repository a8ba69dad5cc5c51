"""How a LoRABatch is divided into rows and tiles and laid into a buffer of given capacities. No Triton, no GPU."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.lora_batch import LoRABatch, RowRanges
from adapters.ops.gpu_batch import LoRACaps, LoRAStaging, fill, fits, from_device, layout, workspace_size
from adapters.ops.gpu_blocks import (
    BLOCK_M,
    MAX_MODULES,
    MAX_ROW_PARTIALS,
    MAX_TILE_PARTIALS,
    block_sizes,
)
from adapters.ops.gpu_routes import MIN_TILE_RUN, Routes, route

Entry = tuple[int, float]
ENTRIES = st.tuples(st.integers(0, 2), st.sampled_from([0.5, 1.0]))
REQUESTS = st.lists(st.tuples(st.integers(0, 90), st.lists(ENTRIES, max_size=2).map(tuple)), min_size=1, max_size=8)


def build(requests: list[tuple[int, RowRanges]], *, min_segment: int = 16) -> LoRABatch | None:
    return LoRABatch.build([c for c, _ in requests], [r for _, r in requests], min_segment=min_segment)


def entries_by_token(routes: Routes) -> dict[int, tuple[Entry, ...]]:
    """Token → what it uses, over both routes; no token twice."""
    found: list[tuple[int, tuple[Entry, ...]]] = []
    for i, token in enumerate(routes.row_tokens.tolist()):
        span = slice(routes.row_indptr[i], routes.row_indptr[i + 1])
        entries = zip(routes.entry_starts[span].tolist(), routes.entry_weights[span].tolist(), strict=True)
        found.append((token, tuple(entries)))
    tiles = (routes.tile_begins, routes.tile_lengths, routes.tile_starts, routes.tile_weights)
    for begin, length, start, weight in zip(*(field.tolist() for field in tiles), strict=True):
        assert 1 <= length <= BLOCK_M
        found += [(token, ((start, weight),)) for token in range(begin, begin + length)]
    assert len({token for token, _ in found}) == len(found), "a token in two routes"
    return dict(found)


@given(REQUESTS, st.booleans())
def test_every_token_with_an_adapter_takes_one_route(requests: list[tuple[int, RowRanges]], with_tiles: bool) -> None:
    batch = build(requests)
    if batch is None:
        return
    tokens = [ranges for count, ranges in requests for _ in range(count)]
    routes = route(batch, with_tiles=with_tiles)
    assert entries_by_token(routes) == {t: ranges for t, ranges in enumerate(tokens) if ranges}
    runs = [(ranges, len(list(run))) for ranges, run in itertools.groupby(tokens)]
    tiles = sum(-(-n // BLOCK_M) for ranges, n in runs if len(ranges) == 1 and n >= MIN_TILE_RUN)
    assert routes.num_tiles == (tiles if with_tiles else 0)


def views_of(caps: LoRACaps) -> dict[str, np.ndarray]:
    return {name: np.full(words, 0x7FFFFFFF, np.int32) for name, words in layout(caps).items()}


def test_fill_writes_every_word_and_nothing_after_the_batch() -> None:
    caps = LoRACaps(num_tokens=40, num_rows=9, num_entries=10, num_tiles=3, max_rank=16)
    views = views_of(caps)
    fill(views, build([(1, ((7, 0.5), (9, 1.0))), (2, ()), (20, ((3, 2.0),))]), caps)
    assert views["row_tokens"].tolist() == [0] * 12
    assert views["row_indptr"].tolist() == [0] + [2] * 11  # rows without entries to the end
    assert views["entry_starts"].tolist() == [7, 9] + [0] * 10
    assert views["entry_weights"].view(np.float32).tolist() == [0.5, 1.0] + [0.0] * 10
    assert views["tile_begins"].tolist() == [3, 0, 0, 0]
    assert views["tile_lengths"].tolist() == [20, 0, 0, 0]
    assert views["tile_weights"].view(np.float32).tolist() == [2.0, 0.0, 0.0, 0.0]
    fill(views, None, caps)
    assert not any(view.any() for view in views.values())


def test_a_batch_without_entries_is_nothing() -> None:
    """What a runner captures its graphs with."""
    none = np.zeros(0, np.int32)
    empty = LoRABatch(np.zeros(1, np.int32), none, np.zeros(0, np.float32), none, ())
    for tiles in (0, 2):
        caps = LoRACaps(num_tokens=8, num_rows=8, num_entries=8, num_tiles=tiles, max_rank=16)
        views = views_of(caps)
        fill(views, empty, caps)
        assert not any(view.any() for view in views.values())


@pytest.mark.parametrize("field", ["num_tokens", "num_rows", "num_entries", "num_tiles"])
def test_a_batch_over_the_capacities_is_refused(field: str) -> None:
    batch = build([(1, ((7, 0.5), (9, 1.0))), (20, ((3, 2.0),)), (60, ((3, 1.0),))])
    assert batch is not None
    least = {"num_tokens": 81, "num_rows": 1, "num_entries": 2, "num_tiles": 2}
    assert fits(batch, LoRACaps(**least, max_rank=16))
    caps = LoRACaps(**(least | {field: least[field] - 1}), max_rank=16)
    assert not fits(batch, caps)
    with pytest.raises(ValueError, match="81 tokens, 1 rows, 2 entries and 2 tiles is over"):
        fill(views_of(caps), batch, caps)


def test_decode_capacities_make_rows_of_a_segment() -> None:
    caps = LoRACaps.decode(70, max_rank=16)
    batch = build([(70, ((3, 1.0),))])
    assert batch is not None and batch.segments
    views = views_of(caps)
    fill(views, batch, caps)
    assert views["row_tokens"][:70].tolist() == list(range(70)) and views["tile_lengths"].size == 0


def test_buckets_share_a_workspace_and_keep_it() -> None:
    staging = LoRAStaging(max_rank=20)
    caps = [staging.bucket(num_rows) for num_rows in (8, 4, 16)]
    large, small, larger = (
        staging.from_device({name: torch.zeros(n, dtype=torch.int32) for name, n in layout(c).items()}, c) for c in caps
    )
    assert small.workspace is large.workspace and larger.workspace is not large.workspace
    assert large.workspace.numel() == workspace_size(caps[0]) == 8 * MAX_ROW_PARTIALS * 32
    with pytest.raises(ValueError, match="a workspace of 16384 elements"):
        views = {name: torch.zeros(n, dtype=torch.int32) for name, n in layout(caps[2]).items()}
        from_device(views, caps[2], workspace=large.workspace)


@pytest.mark.parametrize("in_features", [1, 48, 576, 1536, 4096, 14336, 28672, 53248])
@pytest.mark.parametrize("num_modules", range(1, MAX_MODULES + 1))
@pytest.mark.parametrize("element_size", [2, 4])
def test_splits_cover_the_input_within_the_workspace(in_features: int, num_modules: int, element_size: int) -> None:
    blocks = block_sizes(in_features, (64,) * num_modules, element_size=element_size)
    for split, limit in ((blocks.rows, MAX_ROW_PARTIALS), (blocks.tiles, MAX_TILE_PARTIALS)):
        span = split.steps * split.block_k
        assert (split.count - 1) * span < in_features <= split.count * span
        assert split.count * num_modules <= limit
