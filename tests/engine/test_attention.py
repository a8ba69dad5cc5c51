"""The CPU backend against the reference, and the reference against torch's SDPA on contiguous data."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from adapters.ops.thread_team import current_team, start_team
from server.engine.attention import reference, select_backend
from server.engine.attention.cpu import CPUAttention
from server.engine.attention.interface import AttentionMetadata, KVLayer
from tests.engine.attention_step import TOLERANCE, Step, make_step

CPU = torch.device("cpu")


def assert_same(
    step: Step,
    *,
    scale: float = 0.125,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tolerance: float | None = None,
) -> None:
    """CPU and reference agree on the output, and both leave the same bits in the cache."""
    other = step.clone()
    options = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    fast = select_backend(CPU)(step.q, step.k, step.v, step.layer, step.metadata, **options)  # type: ignore[arg-type]
    slow = reference.attend(other.q, other.k, other.v, other.layer, other.metadata, **options)  # type: ignore[arg-type]
    assert fast.dtype is slow.dtype is step.q.dtype and fast.shape == slow.shape
    assert torch.isfinite(slow).all()
    assert (fast.float() - slow.float()).abs().max().item() <= (tolerance or TOLERANCE[step.q.dtype])
    assert torch.equal(step.layer.k_cache, other.layer.k_cache)
    assert torch.equal(step.layer.v_cache, other.layer.v_cache)


MIXED = [(1, 0), (1, 15), (1, 16), (1, 130), (7, 0), (5, 30), (33, 16), (2, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (9, 3), (8, 1), (6, 2)])
def test_mixed_rows_agree_over_gqa_ratios(dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    assert_same(make_step(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("block_size", [4, 16])
def test_mixed_rows_agree_over_head_dims_and_block_sizes(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    step = make_step(MIXED, num_heads=4, num_kv_heads=2, head_dim=head_dim, block_size=block_size, dtype=dtype)
    assert_same(step, scale=head_dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [1, 7, 16, 500])
def test_sliding_window(dtype: torch.dtype, sliding_window: int) -> None:
    assert_same(make_step(MIXED, block_size=4, dtype=dtype), sliding_window=sliding_window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [None, 9])
def test_softcap(dtype: torch.dtype, sliding_window: int | None) -> None:
    assert_same(make_step(MIXED, dtype=dtype), scale=1.0, softcap=5.0, sliding_window=sliding_window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_narrower_than_keys(dtype: torch.dtype) -> None:
    assert_same(make_step(MIXED, head_dim=48, v_head_dim=32, dtype=dtype))


def test_only_decode_rows_and_only_chunks() -> None:
    assert_same(make_step([(1, 0)]))
    assert_same(make_step([(1, 200)] * 5))
    assert_same(make_step([(6, 10)]))


def test_packed_projections_arrive_as_strided_views() -> None:
    """Models with one qkv matrix hand over slices of it."""
    step = make_step(MIXED, num_heads=4, num_kv_heads=4)
    packed = torch.cat([step.q, step.k, step.v], dim=-1)
    step.q, step.k, step.v = packed.split(64, dim=-1)
    assert not step.k.is_contiguous()
    assert_same(step)


def test_threads_change_nothing() -> None:
    """Heads may be shared out among threads; a head's arithmetic stays on one, so the bits stay the same."""
    step = make_step([(1, 300), (1, 5), (1, 77)], dtype=torch.bfloat16)
    options = {"scale": 0.125, "sliding_window": None, "softcap": None}
    before = current_team().num_threads
    try:
        with start_team(3).step():  # too few rows for three threads: heads are shared out
            shared = CPUAttention()(*_arguments(step), **options)  # type: ignore[arg-type]
        start_team(1)
        assert torch.equal(CPUAttention()(*_arguments(step), **options), shared)  # type: ignore[arg-type]
    finally:
        start_team(before)


def _arguments(step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KVLayer, AttentionMetadata]:
    return step.q, step.k, step.v, step.layer, step.metadata


def test_one_backend_serves_many_layers_and_steps() -> None:
    """Plans are kept per step and views per layer; neither may leak into the next."""
    backend = CPUAttention()
    layers = [make_step([(1, 9)], seed=1).layer, make_step([(1, 9)], seed=2).layer]
    for seed, rows in enumerate([[(1, 4), (3, 2)], [(1, 8), (6, 0)], [(1, 0)], [(1, 9), (2, 0)]]):
        step = make_step(rows, seed=10 + seed)
        for layer in layers:
            small = KVLayer(
                *(torch.cat([c, c, c]).clone() for c in (layer.k_cache, layer.v_cache))
            )  # room for any row's blocks
            twin = KVLayer(small.k_cache.clone(), small.v_cache.clone())
            for _ in range(2):
                got = backend(step.q, step.k, step.v, small, step.metadata, scale=0.1, sliding_window=3, softcap=None)
            want = reference.attend(
                step.q, step.k, step.v, twin, step.metadata, scale=0.1, sliding_window=3, softcap=None
            )
            torch.testing.assert_close(got, want, atol=5e-6, rtol=0)


def test_a_row_reads_what_another_row_writes_in_the_same_step() -> None:
    """Prefix caching may hand a block to one row in the step in which another row fills it."""
    step = make_step([(1, 15), (1, 15)])
    step.metadata.block_tables[1] = step.metadata.block_tables[0]
    step.metadata.slot_mapping[1] = step.metadata.slot_mapping[0]
    step.k[1], step.v[1] = step.k[0], step.v[0]
    assert_same(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """Scores near ±3000: e^score is no float. A score then carries an error of 3000 · 2^-23 · 2, and so do weights."""
    step = make_step(MIXED, dtype=dtype)
    step.q *= 100.0
    assert_same(step, scale=1.0, tolerance=TOLERANCE[dtype] + 4 * 7e-4)


def test_broken_queries_come_out_as_nan_and_stay_in_their_row() -> None:
    step = make_step([(1, 40), (1, 40), (4, 3)])
    step.q[0] = torch.nan
    out = select_backend(CPU)(
        step.q, step.k, step.v, step.layer, step.metadata, scale=0.125, sliding_window=None, softcap=None
    )
    assert torch.isnan(out[0]).all() and torch.isfinite(out[1:]).all()


def test_other_dtypes_are_refused_by_name() -> None:
    step = make_step([(1, 3)], dtype=torch.float16)
    with pytest.raises(ValueError, match="float16"):
        select_backend(CPU)(
            step.q, step.k, step.v, step.layer, step.metadata, scale=1.0, sliding_window=None, softcap=None
        )


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_reference_equals_sdpa_on_contiguous_data(num_kv_heads: int) -> None:
    """One prompt in blocks 0, 1, 2, … is plain causal attention; SDPA computes that from the same q, k and v."""
    q, k, v = torch.randn(20, 4, 32), torch.randn(20, num_kv_heads, 32), torch.randn(20, num_kv_heads, 32)
    layer = KVLayer(torch.zeros(5, 4, num_kv_heads, 32), torch.zeros(5, 4, num_kv_heads, 32))
    metadata = AttentionMetadata(
        query_starts=np.array([0, 20], np.int32),
        context_lens=np.array([20], np.int32),
        block_tables=np.arange(5, dtype=np.int32)[None],
        slot_mapping=np.arange(20, dtype=np.int64),
        num_decode_rows=0,
    )
    got = reference.attend(q, k, v, layer, metadata, scale=0.2, sliding_window=None, softcap=None)
    want = functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(got, want.transpose(0, 1), atol=2e-6, rtol=0)
    assert torch.equal(layer.k_cache.flatten(0, 1), k)


def test_reference_chunks_equal_one_prompt() -> None:
    """The same tokens in one piece, in chunks, and one by one give the same outputs."""
    whole = make_step([(12, 0)], block_size=4)
    options = {"scale": 0.125, "sliding_window": 5, "softcap": 3.0}
    want = reference.attend(*_arguments(whole), **options)  # type: ignore[arg-type]
    for sizes in ([5, 7], [1] * 12, [3, 1, 8]):
        step, at, pieces = whole.clone(), 0, []
        for size in sizes:
            rows = slice(at, at + size)
            metadata = AttentionMetadata(
                query_starts=np.array([0, size], np.int32),
                context_lens=np.array([at + size], np.int32),
                block_tables=whole.metadata.block_tables,
                slot_mapping=whole.metadata.slot_mapping[rows],
                num_decode_rows=int(size == 1),
            )
            args = step.q[rows], step.k[rows], step.v[rows], step.layer, metadata
            pieces.append(reference.attend(*args, **options))  # type: ignore[arg-type]
            at += size
        torch.testing.assert_close(torch.cat(pieces), want, atol=2e-6, rtol=0)
