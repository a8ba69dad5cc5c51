"""Decode rows of bfloat16, whose loops are written for some shapes: against torch in float32, and in any company."""

import numpy as np
import pytest
import torch

from adapters.ops import bf16_dot
from server.engine.attention import reference
from server.engine.attention.cpu import CPUAttention
from server.engine.attention.decode_bf16 import suits
from server.engine.attention.interface import AttentionMetadata
from tests.engine.attention_step import Step, make_step

pytestmark = pytest.mark.skipif(not bf16_dot.is_supported(), reason="this processor has no bfloat16 dot product")

CONTEXTS = [1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 300]
HEADS = [(3, 3), (4, 2), (9, 3), (4, 1), (10, 2), (7, 1), (16, 2)]


def attend(step: Step, *, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
    return CPUAttention()(
        step.q, step.k, step.v, step.layer, step.metadata, scale=0.125, sliding_window=window, softcap=softcap
    )


def in_float32(step: Step, *, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
    """The reference on the same numbers, unrounded."""
    layer = type(step.layer)(step.layer.k_cache.float(), step.layer.v_cache.float())
    q, k, v = step.q.float(), step.k.float(), step.v.float()
    return reference.attend(q, k, v, layer, step.metadata, scale=0.125, sliding_window=window, softcap=softcap)


def decode_step(num_heads: int, num_kv_heads: int, head_dim: int, v_head_dim: int | None = None) -> Step:
    rows = [(1, context - 1) for context in CONTEXTS]
    return make_step(
        rows, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, v_head_dim=v_head_dim,
        dtype=torch.bfloat16,
    )  # fmt: skip


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Half a unit of bfloat16's last place, and float32's own error before it."""
    assert torch.isfinite(found).all()
    assert bool(((found.float() - exact).abs() <= 2**-8 * 1.01 * exact.abs() + 1e-5).all())


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(64, 64), (128, 128), (64, 128), (128, 64)])
def test_is_float32_rounded_once(num_heads: int, num_kv_heads: int, head_dim: int, v_head_dim: int) -> None:
    assert suits(head_dim, v_head_dim)
    step = decode_step(num_heads, num_kv_heads, head_dim, v_head_dim)
    exact = in_float32(step)
    assert_rounded_once(attend(step), exact)


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (20, None), (None, 5.0), (33, 5.0)])
def test_windows_and_caps(window: int | None, softcap: float | None) -> None:
    step = decode_step(9, 3, 64)
    exact = in_float32(step, window=window, softcap=softcap)
    assert_rounded_once(attend(step, window=window, softcap=softcap), exact)


@pytest.mark.parametrize("shape", [(32, 32), (96, 96), (64, 32), (80, 64)])
def test_other_shapes_take_the_general_loops(shape: tuple[int, int]) -> None:
    assert not suits(*shape)
    step = decode_step(6, 2, *shape)
    exact = in_float32(step)
    assert_rounded_once(attend(step), exact)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (7, 1)])
def test_a_row_has_the_same_bits_alone_and_in_company(num_heads: int, num_kv_heads: int) -> None:
    """Alone its heads are shared out among chunks, in company they are not."""
    step = decode_step(num_heads, num_kv_heads, 64)
    together = attend(step)
    for row in range(len(CONTEXTS)):
        one = slice(row, row + 1)
        metadata = AttentionMetadata(
            query_starts=np.array([0, 1], np.int32),
            context_lens=step.metadata.context_lens[one],
            block_tables=step.metadata.block_tables[one].copy(),
            slot_mapping=step.metadata.slot_mapping[one],
            num_decode_rows=1,
        )
        alone = Step(step.q[one], step.k[one], step.v[one], step.layer, metadata)
        assert torch.equal(attend(alone), together[one]), CONTEXTS[row]


def test_what_lies_behind_a_rows_context_is_not_read() -> None:
    """Slots past the context hold whatever was there: a NaN among them must not come out."""
    step = decode_step(9, 3, 64)
    expected = attend(step)
    for row, context in enumerate(CONTEXTS):
        table, length = step.metadata.block_tables[row], -(-context // 16) * 16
        for at in range(context, length):
            slot = int(table[at // 16]) * 16 + at % 16
            step.layer.k_cache.view(-1, 3, 64)[slot] = torch.nan
            step.layer.v_cache.view(-1, 3, 64)[slot] = torch.nan
    assert torch.equal(attend(step), expected)


def test_a_broken_query_or_key_comes_out_as_nan_in_its_own_heads() -> None:
    step = decode_step(9, 3, 64)
    step.q[4, 1] = torch.nan
    step.k[7, 2] = torch.nan
    out = attend(step)
    broken = torch.zeros(len(CONTEXTS), 9, dtype=torch.bool)
    broken[4, 1], broken[7, 6:] = True, True
    assert torch.equal(torch.isnan(out).all(-1), broken) and torch.equal(torch.isnan(out).any(-1), broken)
