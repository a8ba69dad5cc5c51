"""`LoRABatch.build` against a token-by-token model of what it means, and its joining rule by example."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.lora_batch import TILE, LoRABatch, RowRanges, Segment


def build(token_counts: list[int], ranges: list[RowRanges], min_segment: int) -> LoRABatch:
    batch = LoRABatch.build(token_counts, ranges, min_segment=min_segment)
    assert batch is not None
    return batch


def entries(batch: LoRABatch) -> list[RowRanges]:
    """The CSR read back, one tuple a token."""
    pairs = list(zip(batch.starts.tolist(), batch.weights.tolist(), strict=True))
    bounds = batch.indptr.tolist()
    return [tuple(pairs[begin:end]) for begin, end in zip(bounds, bounds[1:], strict=False)]


def test_a_step_of_base_rows_is_none() -> None:
    assert LoRABatch.build([1, 5, 1], [(), (), ()], min_segment=2) is None
    assert LoRABatch.build([], [], min_segment=2) is None


def test_decode_rows_and_base_rows() -> None:
    batch = build([1, 1, 1], [((0, 1.0),), (), ((8, 0.5),)], min_segment=4)
    assert entries(batch) == [((0, 1.0),), (), ((8, 0.5),)]
    assert batch.rows.tolist() == [0, 2]
    assert batch.segments == ()
    assert (batch.indptr.dtype, batch.starts.dtype, batch.weights.dtype, batch.rows.dtype) == (
        np.int32,
        np.int32,
        np.float32,
        np.int32,
    )


def test_which_kernel_serves_a_request_does_not_depend_on_its_neighbours() -> None:
    one: RowRanges = ((16, 1.0),)
    assert build([1, 1, 2, 1], [one, one, one, ()], 4).segments == ()
    assert build([2, 1, 3], [one, one, one], 2).segments == (Segment(0, 2, 16, 1.0), Segment(3, 6, 16, 1.0))


def test_tiles_share_a_segment_out() -> None:
    batch = build([TILE + 5, 1, TILE], [((0, 1.0),), (), ((8, 0.5),)], 2)
    assert batch.tiles.where.tolist() == [[0, TILE, 0], [TILE, 5, 0], [TILE + 6, TILE, 8]]
    assert batch.tiles.weights.tolist() == [1.0, 1.0, 0.5]


def test_a_run_under_min_segment_goes_to_the_row_kernel() -> None:
    batch = build([3, 1, 4], [((0, 1.0),), (), ((0, 1.0),)], 4)
    assert batch.segments == (Segment(4, 8, 0, 1.0),)
    assert batch.rows.tolist() == [0, 1, 2]


def test_composition_goes_to_the_row_kernel_however_long() -> None:
    two: RowRanges = ((0, 1.0), (8, -0.25))
    batch = build([3, 2], [two, ((4, 1.0),)], 2)
    assert entries(batch) == [two, two, two, ((4, 1.0),), ((4, 1.0),)]
    assert batch.rows.tolist() == [0, 1, 2]
    assert batch.segments == (Segment(3, 5, 4, 1.0),)


def test_misuse_is_an_error() -> None:
    with pytest.raises(ValueError, match="min_segment is 0"):
        LoRABatch.build([1], [((0, 1.0),)], min_segment=0)
    with pytest.raises(ValueError):
        LoRABatch.build([1, 1], [((0, 1.0),)], min_segment=1)


RANGES = st.lists(st.tuples(st.sampled_from([0, 8, 24]), st.sampled_from([1.0, 0.0, -0.5])), max_size=3).map(tuple)


@given(st.lists(st.tuples(st.integers(0, 6), RANGES), max_size=12), st.integers(1, 8))
def test_every_token_keeps_its_adapters_and_is_served_once(
    requests: list[tuple[int, RowRanges]], min_segment: int
) -> None:
    token_ranges = [ranges for count, ranges in requests for _ in range(count)]
    batch = LoRABatch.build([count for count, _ in requests], [r for _, r in requests], min_segment=min_segment)
    assert (batch is None) == (not any(token_ranges))
    if batch is None:
        return
    assert batch.num_tokens == len(token_ranges)
    assert entries(batch) == token_ranges
    served = batch.rows.tolist()
    for segment in batch.segments:
        assert segment.end - segment.begin >= min_segment
        assert set(token_ranges[segment.begin : segment.end]) == {((segment.start, segment.weight),)}
        served.extend(range(segment.begin, segment.end))
    assert sorted(served) == [t for t, ranges in enumerate(token_ranges) if ranges]
