"""The kernel for rows with several new tokens: what it computes, and that how a prompt was cut never shows."""

import numpy as np
import pytest
import torch

from adapters.ops import bf16_dot
from adapters.ops.thread_team import start_team
from server.engine.attention import prefill_kernels
from server.engine.attention.cpu import CPUAttention
from server.engine.attention.interface import AttentionMetadata
from tests.engine.test_attention import Step, assert_same, make_step

pytestmark = pytest.mark.skipif(not bf16_dot.is_supported(), reason="this processor has no bfloat16 dot product")

BF16 = torch.bfloat16


def attend(step: Step) -> torch.Tensor:
    arguments = (step.q, step.k, step.v, step.layer, step.metadata)
    return CPUAttention()(*arguments, scale=0.125, sliding_window=None, softcap=None)


@pytest.fixture(autouse=True)
def count_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's attention must not be what is tested here."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch's attention was called")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)


@pytest.mark.parametrize("lengths", [(2, 0), (16, 0), (17, 0), (85, 0), (3, 1), (40, 29), (5, 300)])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(64, 64), (32, 96), (128, 32)])
def test_agrees_with_the_reference(lengths: tuple[int, int], head_dim: int, v_head_dim: int) -> None:
    assert_same(make_step([(1, 9), lengths, (20, 3)], head_dim=head_dim, v_head_dim=v_head_dim, dtype=BF16))


@pytest.mark.parametrize("cut", [2, 15, 16, 33, 80])
def test_how_a_prompt_is_cut_shows_in_no_bit(cut: int) -> None:
    whole = make_step([(85, 7)], dtype=BF16)
    parts = whole.clone()
    expected = attend(whole)
    tables, slots = parts.metadata.block_tables, parts.metadata.slot_mapping
    found = []
    for begin, end in ((0, cut), (cut, 85)):
        metadata = AttentionMetadata(
            query_starts=np.array([0, end - begin], np.int32),
            context_lens=np.array([7 + end], np.int32),
            block_tables=tables,
            slot_mapping=slots[begin:end],
            num_decode_rows=0,
        )
        rows = slice(begin, end)
        found.append(attend(Step(parts.q[rows], parts.k[rows], parts.v[rows], parts.layer, metadata)))
    assert torch.equal(torch.cat(found), expected)


def test_slots_nobody_wrote_do_not_leak() -> None:
    step = make_step([(37, 0)], dtype=BF16)
    used = torch.zeros(step.layer.k_cache.shape[0] * 16, dtype=torch.bool)
    used[torch.from_numpy(step.metadata.slot_mapping)] = True
    for cache in (step.layer.k_cache, step.layer.v_cache):
        cache.flatten(0, 1)[~used] = torch.nan
    assert torch.isfinite(attend(step)).all()


def test_a_broken_token_breaks_those_that_see_it_and_no_other() -> None:
    step = make_step([(30, 0), (20, 0)], dtype=BF16)
    step.k[12] = torch.nan
    found = attend(step)
    assert torch.isfinite(found[:12]).all() and torch.isfinite(found[30:]).all()
    assert found[12:30].isnan().all()


def test_threads_change_no_bit() -> None:
    step = make_step([(60, 11), (50, 0)], dtype=BF16)
    alone = attend(step.clone())
    from_team = start_team(3)
    try:
        with from_team.step():
            assert torch.equal(attend(step), alone)
    finally:
        start_team(1)


def test_odd_head_sizes_are_left_to_torch() -> None:
    assert prefill_kernels.suits(64, 64) and not prefill_kernels.suits(48, 64) and not prefill_kernels.suits(64, 40)
