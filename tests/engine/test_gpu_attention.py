"""The Triton backend against the reference: on the GPU when there is one, else in Triton's interpreter."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tests.triton_interpreter import DEVICE, require_triton

require_triton()

from server.engine.attention import gpu_batch, reference, select_backend  # noqa: E402
from server.engine.attention.gpu import GPUAttention  # noqa: E402
from server.engine.attention.gpu_batch import TILE_QUERIES, AttentionCaps, GPUAttentionBatch  # noqa: E402
from server.engine.attention.interface import AttentionMetadata, KVLayer  # noqa: E402
from tests.engine.attention_step import TOLERANCE, Step, make_step  # noqa: E402

MIN_SPLIT, MAX_SPLITS = 16, 4
"""Small, so that contexts of a few dozen tokens have several splits, and one of 130 longer ones."""

MIXED = [(1, 0), (1, 15), (1, 16), (1, 130), (7, 0), (5, 30), (33, 16), (2, 1)]
FEW = [(1, 7), (1, 75), (6, 0), (19, 21)]


@dataclass(frozen=True, kw_only=True)
class Options:
    scale: float = 0.125
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def on_device(step: Step) -> Step:
    layer = KVLayer(step.layer.k_cache.to(DEVICE), step.layer.v_cache.to(DEVICE))
    return Step(step.q.to(DEVICE), step.k.to(DEVICE), step.v.to(DEVICE), layer, step.metadata)


def caps_of(metadata: AttentionMetadata, *, more_tokens: int = 0, more_rows: int = 0) -> AttentionCaps:
    num_rows, max_blocks = metadata.block_tables.shape
    return AttentionCaps(
        num_tokens=len(metadata.slot_mapping) + more_tokens,
        num_rows=num_rows + more_rows,
        max_blocks=max_blocks + 2,
        is_decode=metadata.num_decode_rows == num_rows,
    )


class Buffer:
    """The words of one bucket, full of what no kernel would survive until they are filled."""

    def __init__(self, caps: AttentionCaps) -> None:
        words = gpu_batch.layout(caps)
        self.caps = caps
        self.host = np.full(sum(words.values()), 10**8, np.int32)
        ends = np.cumsum(list(words.values()))
        self.views = dict(zip(words, np.split(self.host, ends[:-1]), strict=True))
        self.words = torch.from_numpy(self.host.copy()).to(DEVICE)
        parts = self.words.split(list(words.values()))
        self.batch = gpu_batch.from_device(dict(zip(words, parts, strict=True)), caps)

    def fill(self, metadata: AttentionMetadata) -> GPUAttentionBatch:
        gpu_batch.fill(self.views, metadata, self.caps)
        self.words.copy_(torch.from_numpy(self.host))
        return self.batch


def run(step: Step, batch: GPUAttentionBatch | None = None, options: Options | None = None) -> torch.Tensor:
    """Padded to the batch's tokens with NaN, which must harm nothing; returns all of them."""
    batch, options = batch or Buffer(caps_of(step.metadata)).fill(step.metadata), options or Options()
    padding = batch.caps.num_tokens - len(step.q)
    q, k, v = (torch.cat([x, x.new_full((padding, *x.shape[1:]), torch.nan)]) for x in (step.q, step.k, step.v))
    attend = GPUAttention(min_split=MIN_SPLIT, max_splits=MAX_SPLITS)
    return attend(q, k, v, step.layer, batch, **vars(options))


def assert_same(step: Step, options: Options | None = None, *, tolerance: float | None = None) -> None:
    """GPU and reference agree on the output, and both leave the same bits in the cache."""
    options = options or Options()
    ours = on_device(step.clone())
    fast = run(ours, options=options).cpu()
    slow = reference.attend(step.q, step.k, step.v, step.layer, step.metadata, **vars(options))
    assert fast.dtype is slow.dtype is step.q.dtype and fast.shape == slow.shape
    assert torch.isfinite(slow).all()
    assert (fast.float() - slow.float()).abs().max().item() <= (tolerance or TOLERANCE[step.q.dtype])
    assert torch.equal(ours.layer.k_cache.cpu(), step.layer.k_cache)
    assert torch.equal(ours.layer.v_cache.cpu(), step.layer.v_cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (4, 1)])
def test_mixed_rows_agree_over_gqa_groups(dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    assert_same(make_step(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads, dtype=dtype))


def test_more_query_heads_than_a_tile_of_the_matrix_units() -> None:
    assert_same(make_step(FEW, num_heads=20, num_kv_heads=1, head_dim=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(8, 8), (80, 80), (96, 64), (128, 128), (48, 80)])
def test_head_dims_that_fill_no_block_and_values_of_another_width(
    dtype: torch.dtype, head_dim: int, v_head_dim: int
) -> None:
    rows = [(1, 33), (5, 12)]
    step = make_step(rows, num_heads=4, num_kv_heads=2, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype)
    assert_same(step, Options(scale=head_dim**-0.5))


@pytest.mark.parametrize("block_size", [1, 4, 16, 24])
def test_contexts_around_block_and_split_boundaries(block_size: int) -> None:
    lens = [1, 2, 4, 5, 15, 16, 17, 32, 33, 63, 64, 65, 80, 97]
    rows = [(1, length - 1) for length in lens] + [(3, length) for length in (1, 13, 14)]
    assert_same(make_step(rows, num_heads=2, num_kv_heads=1, head_dim=16, block_size=block_size))


def test_a_chunk_of_several_tiles_with_history() -> None:
    rows = [(1, 20), (TILE_QUERIES, 0), (TILE_QUERIES + 1, 21)]
    assert_same(make_step(rows, num_heads=3, num_kv_heads=1, head_dim=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [1, 7, 16, 40, 500])
def test_sliding_window(dtype: torch.dtype, sliding_window: int) -> None:
    step = make_step(FEW, num_heads=2, num_kv_heads=1, head_dim=32, block_size=4, dtype=dtype)
    assert_same(step, Options(sliding_window=sliding_window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [None, 9])
def test_softcap(dtype: torch.dtype, sliding_window: int | None) -> None:
    step = make_step(FEW, num_heads=2, num_kv_heads=1, head_dim=32, dtype=dtype)
    assert_same(step, Options(scale=1.0, softcap=5.0, sliding_window=sliding_window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sliding_window", "softcap"), [(None, None), (9, None), (20, 3.0)])
def test_sinks(dtype: torch.dtype, sliding_window: int | None, softcap: float | None) -> None:
    """From a sink that takes nothing to one that takes nearly all."""
    step = make_step(FEW, num_heads=6, num_kv_heads=2, head_dim=32, dtype=dtype)
    sinks = torch.tensor([-torch.inf, -30.0, 0.0, 2.5, 8.0, 60.0]).to(dtype)
    assert_same(step, Options(scale=0.2, sliding_window=sliding_window, softcap=softcap, sinks=sinks))


def test_large_scores_do_not_overflow() -> None:
    """Scores near ±3000: e^score is no float. A score then carries an error of 3000 · 2^-23 · 2, and so do weights."""
    step = make_step(FEW, num_heads=2, num_kv_heads=1)
    step.q *= 100.0
    assert_same(step, Options(scale=1.0), tolerance=TOLERANCE[torch.float32] + 4 * 7e-4)


def test_packed_projections_arrive_as_strided_views() -> None:
    """Models with one qkv matrix hand over slices of it; others transpose heads and tokens."""
    step = make_step([(1, 20), (1, 3), (6, 9)], num_heads=2, num_kv_heads=2, head_dim=32)
    ours = on_device(step.clone())
    ours.q, ours.k, ours.v = torch.cat([ours.q, ours.k, ours.v], dim=-1).split(32, dim=-1)
    ours.q = ours.q.transpose(0, 1).contiguous().transpose(0, 1)
    got = GPUAttention()(ours.q, ours.k, ours.v, ours.layer, step.metadata, **vars(Options()))
    want = reference.attend(step.q, step.k, step.v, step.layer, step.metadata, **vars(Options()))
    assert not ours.q.is_contiguous() and not ours.k.is_contiguous()
    torch.testing.assert_close(got.cpu(), want, atol=5e-6, rtol=0)
    assert torch.equal(ours.layer.v_cache.cpu(), step.layer.v_cache)


def test_slots_outside_the_contexts_are_never_read() -> None:
    """NaN times a weight of 0 is still NaN: whatever is not of the row's context must not be loaded."""
    step = on_device(make_step([*FEW, (5, 9)], num_heads=2, num_kv_heads=1, head_dim=32))
    used = np.concatenate(
        [
            step.metadata.block_tables[row, at // 16] * 16 + at % 16
            for row, length in enumerate(step.metadata.context_lens)
            for at in [np.arange(length)]
        ]
    )
    for cache in (step.layer.k_cache, step.layer.v_cache):
        slots = cache.view(-1, *cache.shape[2:])
        unused = torch.ones(len(slots), dtype=torch.bool)
        unused[torch.from_numpy(used)] = False
        slots[unused.to(DEVICE)] = torch.nan
    for window in (None, 6):
        assert torch.isfinite(run(step, options=Options(sliding_window=window))).all()


def test_what_lies_before_the_window_is_never_read() -> None:
    step = on_device(make_step([(1, 60), (4, 60)], num_heads=4, num_kv_heads=2, head_dim=32))
    for row in range(2):
        block = int(step.metadata.block_tables[row, 0])  # tokens [0, 16), the window begins at 41 and 45
        step.layer.k_cache[block], step.layer.v_cache[block] = torch.nan, torch.nan
    assert torch.isfinite(run(step, options=Options(sliding_window=20))).all()
    assert torch.isnan(run(step)).all()


def test_broken_queries_come_out_as_nan_and_stay_in_their_row() -> None:
    step = on_device(make_step([(1, 40), (1, 40), (4, 3), (2, 0)], num_heads=4, num_kv_heads=2, head_dim=32))
    step.q[[0, 3]] = torch.nan
    out = run(step)
    broken = torch.isnan(out).flatten(1)
    assert broken[[0, 3]].all() and not broken[[1, 2, 4, 5, 6, 7]].any()


def test_a_row_reads_what_another_row_writes_in_the_same_step() -> None:
    """Prefix caching may hand a block to one row in the step in which another row fills it."""
    step = make_step([(1, 15), (1, 15)], num_heads=2, num_kv_heads=1, head_dim=16)
    step.metadata.block_tables[1] = step.metadata.block_tables[0]
    step.metadata.slot_mapping[1] = step.metadata.slot_mapping[0]
    step.k[1], step.v[1] = step.k[0], step.v[0]
    assert_same(step)


def alone(step: Step, row: int) -> Step:
    """Decode row `row` of `step` as a step of its own."""
    old, token = step.metadata, slice(row, row + 1)
    metadata = AttentionMetadata(
        query_starts=np.array([0, 1], np.int32),
        context_lens=old.context_lens[token],
        block_tables=old.block_tables[token],
        slot_mapping=old.slot_mapping[token],
        num_decode_rows=1,
    )
    return Step(step.q[token], step.k[token], step.v[token], step.layer, metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [None, 30])
def test_a_decode_row_has_the_same_bits_alone_in_company_and_in_larger_buckets(
    dtype: torch.dtype, sliding_window: int | None
) -> None:
    step = on_device(make_step(MIXED, num_heads=6, num_kv_heads=2, head_dim=32, dtype=dtype))
    options = Options(sliding_window=sliding_window)
    company = run(step, options=options)
    for row in range(step.metadata.num_decode_rows):
        single = alone(step, row)
        needed = -(-int(single.metadata.context_lens[0]) // 16)
        tables = single.metadata.block_tables[:, :needed]
        tight = Buffer(
            replace(caps_of(single.metadata), max_blocks=needed)  # fewer splits in the grid
        ).fill(replace(single.metadata, block_tables=tables))
        wide = Buffer(caps_of(single.metadata, more_tokens=5, more_rows=5)).fill(single.metadata)
        assert torch.equal(run(single, tight, options)[0], company[row])
        assert torch.equal(run(single, wide, options)[0], company[row])


def test_a_chunk_has_the_same_bits_in_any_company() -> None:
    step = on_device(make_step([(1, 8), (9, 30)], num_heads=4, num_kv_heads=2, head_dim=32))
    both, old = run(step), step.metadata
    metadata = AttentionMetadata(
        query_starts=np.array([0, 9], np.int32),
        context_lens=old.context_lens[1:],
        block_tables=old.block_tables[1:],
        slot_mapping=old.slot_mapping[1:],
        num_decode_rows=0,
    )
    assert torch.equal(run(Step(step.q[1:], step.k[1:], step.v[1:], step.layer, metadata)), both[1:])


def test_a_bucket_serves_step_after_step_and_its_padding_touches_nothing() -> None:
    """A full step, then smaller ones over the same words: nothing of the step before may act again."""
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    steps = [[(1, 9), (1, 40), (40, 3), (9, 17)], [(1, 5)], [(6, 2)], [(1, 17), (3, 30)]]
    first = make_step(steps[0], **shape)  # type: ignore[arg-type]
    buffer = Buffer(caps_of(first.metadata, more_tokens=3, more_rows=2))
    for seed, rows in enumerate(steps):
        step = make_step(rows, **shape, seed=seed)  # type: ignore[arg-type]
        ours = on_device(step.clone())
        got = run(ours, buffer.fill(step.metadata)).cpu()
        want = reference.attend(step.q, step.k, step.v, step.layer, step.metadata, **vars(Options()))
        torch.testing.assert_close(got[: len(want)], want, atol=5e-6, rtol=0)
        assert (got[len(want) :] == 0).all()
        assert torch.equal(ours.layer.k_cache.cpu(), step.layer.k_cache)
        assert torch.equal(ours.layer.v_cache.cpu(), step.layer.v_cache)


def test_a_decode_bucket_of_padding_alone_writes_zeros_and_leaves_the_cache() -> None:
    """What a graph is captured on: a batch without rows."""
    nothing = AttentionMetadata(
        query_starts=np.zeros(1, np.int32),
        context_lens=np.zeros(0, np.int32),
        block_tables=np.zeros((0, 0), np.int32),
        slot_mapping=np.zeros(0, np.int64),
        num_decode_rows=0,
    )
    step = on_device(make_step([(1, 3)], num_heads=4, num_kv_heads=2, head_dim=16))
    empty = Step(step.q[:0], step.k[:0], step.v[:0], step.clone().layer, nothing)
    batch = Buffer(AttentionCaps(num_tokens=4, num_rows=4, max_blocks=3, is_decode=True)).fill(nothing)
    for sinks in (None, torch.ones(4, device=DEVICE)):
        assert torch.equal(run(empty, batch, Options(sinks=sinks)), torch.zeros(4, 4, 16, device=DEVICE))
    assert torch.equal(empty.layer.k_cache, step.layer.k_cache)


def test_one_backend_serves_steps_that_nobody_staged_and_grows() -> None:
    backend = GPUAttention(min_split=MIN_SPLIT, max_splits=MAX_SPLITS)
    for seed, rows in enumerate([[(1, 4), (3, 2)], [(1, 80)] * 3, [(6, 0)], [(1, 9), (2, 0)]]):
        step = make_step(rows, num_heads=2, num_kv_heads=1, head_dim=16, seed=seed)
        ours = on_device(step.clone())
        want = reference.attend(step.q, step.k, step.v, step.layer, step.metadata, **vars(Options()))
        for _ in range(2):
            got = backend(ours.q, ours.k, ours.v, ours.layer, ours.metadata, **vars(Options()))
            torch.testing.assert_close(got.cpu(), want, atol=5e-6, rtol=0)


def test_reserved_memory_holds_every_step_of_the_caps() -> None:
    backend = GPUAttention(min_split=MIN_SPLIT, max_splits=MAX_SPLITS)
    step = on_device(make_step([(1, 100)] * 3, num_heads=4, num_kv_heads=2, head_dim=16))
    batch = Buffer(caps_of(step.metadata)).fill(step.metadata)
    backend.reserve(batch.caps, num_heads=4, v_head_dim=16, block_size=16, device=DEVICE)
    reserved = list(backend._scratch)
    backend(step.q, step.k, step.v, step.layer, batch, **vars(Options()))
    assert len(reserved) == 1 and backend._scratch == reserved


def test_what_does_not_fit_is_refused_by_name() -> None:
    step = on_device(make_step([(1, 3), (2, 3)], num_heads=2, num_kv_heads=1, head_dim=16))
    caps = caps_of(step.metadata)
    for small in ({"num_tokens": 2}, {"num_rows": 1}, {"max_blocks": 0}):
        with pytest.raises(ValueError, match="take a larger bucket"):
            Buffer(replace(caps, **small)).fill(step.metadata)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 of 2 rows have several new tokens"):
        Buffer(replace(caps, is_decode=True)).fill(step.metadata)
    batch = Buffer(caps).fill(step.metadata)
    with pytest.raises(RuntimeError, match="staged for 3 tokens met queries of 2"):
        GPUAttention()(step.q[:2], step.k[:2], step.v[:2], step.layer, batch, **vars(Options()))
    halves = on_device(make_step([(1, 3)], dtype=torch.float16))
    with pytest.raises(ValueError, match="float16"):
        run(halves)


def test_the_device_chooses_the_backend() -> None:
    assert isinstance(select_backend(torch.device("cuda")), GPUAttention)
    assert not isinstance(select_backend(torch.device("cpu")), GPUAttention)
