"""aLoRA without a model: where an adapter begins, which tokens it acts on, and which blocks it shares with the base."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter_ref import AdapterUse, AdapterVersion
from adapters.lora_batch import RowRanges
from server.engine.block_manager import BlockManager
from server.engine.forward_batch import build_forward_batch
from server.engine.invocation import begin_of
from server.engine.request import Request, SamplingParams
from server.engine.scheduler_output import ScheduledRow

A, B, C = (AdapterVersion(letter * 64) for letter in "abc")
START_OF = {A: 3, B: 11, C: 20}
BLOCK = 4


def request(prompt: list[int], *uses: AdapterUse, name: str = "r") -> Request:
    return Request(request_id=name, prompt_token_ids=tuple(prompt), sampling_params=SamplingParams(), adapters=uses)


def row_ranges(uses: tuple[AdapterUse, ...]) -> RowRanges:
    return tuple((START_OF[use.version], use.weight) for use in uses)


@given(prompt=st.lists(st.integers(0, 2), max_size=12), invocation=st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_the_last_occurrence_wherever_it_stands(prompt: list[int], invocation: list[int]) -> None:
    found = [at for at in range(len(prompt)) if prompt[at : at + len(invocation)] == invocation]
    assert begin_of(prompt, invocation) == (found[-1] if found else None)


begins = st.integers(0, 24)
use_sets = st.dictionaries(st.sampled_from([A, B, C]), st.tuples(begins, st.sampled_from([1.0, -0.5])), max_size=3)


@settings(max_examples=200)
@given(rows=st.lists(st.tuples(use_sets, st.integers(0, 24), st.integers(1, 12)), min_size=1, max_size=4))
def test_each_token_has_the_adapters_that_have_begun(
    rows: list[tuple[dict[AdapterVersion, tuple[int, float]], int, int]],
) -> None:
    """Chunks anywhere: a row's first new token is any token of it, the invocation before, within or after the chunk."""
    scheduled = []
    for at, (chosen, computed, num_new) in enumerate(rows):
        uses = [AdapterUse(version, weight, begin) for version, (begin, weight) in sorted(chosen.items())]
        each = request(list(range(computed + num_new)), *uses, name=str(at))
        each.num_computed_tokens = computed
        each.block_table = list(range(10))
        scheduled.append(ScheduledRow(each, num_new))
    batch = build_forward_batch(scheduled, BLOCK, row_ranges)
    expected = []
    for row in sorted(
        scheduled, key=lambda r: r.num_new_tokens > 1 or r.request.num_computed_tokens < len(r.request.prompt_token_ids)
    ):
        for position in range(row.request.num_computed_tokens, row.request.num_computed_tokens + row.num_new_tokens):
            acting = [use for use in row.request.adapters if use.active_from <= position]
            expected.append([(START_OF[use.version], np.float32(use.weight)) for use in acting])
    assert batch.num_tokens == len(expected)
    if batch.lora is None:
        assert not any(expected)
        return
    lora = batch.lora
    found = [
        [(int(lora.starts[e]), lora.weights[e]) for e in range(lora.indptr[t], lora.indptr[t + 1])]
        for t in range(lora.num_tokens)
    ]
    assert found == expected
    served = [*lora.rows.tolist(), *(t for segment in lora.segments for t in range(segment.begin, segment.end))]
    assert sorted(served) == [t for t, entries in enumerate(expected) if entries]


def cached(blocks: BlockManager, prompt: list[int], *uses: AdapterUse) -> int:
    """Tokens found for such a request; then it is computed and given back, so that others may find its blocks."""
    each = request(prompt, *uses, name=f"{len(prompt)}{uses}")
    found = blocks.match_prefix(each)
    each.num_computed_tokens = found
    assert blocks.allocate_slots(each, len(prompt) - found)
    each.num_computed_tokens = len(prompt)
    blocks.commit(each)
    blocks.check_integrity()
    blocks.forget(each)
    return found


PROMPT = [50 + at for at in range(22)]  # five full blocks


def test_what_stands_before_the_invocation_is_shared_both_ways() -> None:
    for begin, shared in ((1, 0), (3, 0), (4, 4), (5, 4), (7, 4), (8, 8), (11, 8), (19, 16), (20, 20), (21, 20)):
        blocks = BlockManager(64, BLOCK)
        assert cached(blocks, PROMPT) == 0
        assert cached(blocks, PROMPT, AdapterUse(A, 1.0, begin)) == shared  # from the base
        assert cached(blocks, PROMPT, AdapterUse(A, 1.0, begin)) == 20  # its own
        blocks = BlockManager(64, BLOCK)
        assert cached(blocks, PROMPT, AdapterUse(A, 1.0, begin)) == 0
        assert cached(blocks, PROMPT) == shared  # by the base
        assert cached(blocks, PROMPT, AdapterUse(B, 1.0, begin)) == shared  # by another that begins there
        assert cached(blocks, PROMPT, AdapterUse(A, 0.5, begin)) == shared  # with another weight
        assert cached(blocks, PROMPT, AdapterUse(A)) == 0  # a plain adapter acts from the first token


def test_an_invocation_at_the_first_token_is_a_plain_adapter() -> None:
    blocks = BlockManager(64, BLOCK)
    cached(blocks, PROMPT, AdapterUse(A, 1.0, 0))
    assert cached(blocks, PROMPT, AdapterUse(A)) == 20
    assert cached(blocks, PROMPT) == 0


def test_beside_a_plain_adapter_the_blocks_before_are_that_ones() -> None:
    blocks = BlockManager(64, BLOCK)
    cached(blocks, PROMPT)
    assert cached(blocks, PROMPT, AdapterUse(A), AdapterUse(B, 1.0, 9)) == 0
    assert cached(blocks, PROMPT, AdapterUse(A)) == 8


def _collide(_: bytes) -> bytes:
    return b"same"


def test_colliding_digests_serve_nobody_anothers_blocks() -> None:
    blocks = BlockManager(64, BLOCK, digest=_collide)
    short = PROMPT[:5]  # one full block
    cached(blocks, short, AdapterUse(A, 1.0, 2))
    assert cached(blocks, short) == 0
    assert cached(blocks, short, AdapterUse(A, 1.0, 3)) == 0
    assert cached(blocks, short, AdapterUse(A, 1.0, 2)) == 4


@settings(max_examples=150)
@given(data=st.data())
def test_a_hit_always_has_the_keys_it_would_compute(data: st.DataObject) -> None:
    """Of random requests: two blocks are one only when every token of both was computed with the same adapters."""
    blocks = BlockManager(256, BLOCK)
    holders: dict[int, list[tuple[int, tuple[AdapterUse, ...]]]] = {}
    for at in range(data.draw(st.integers(2, 6))):
        prompt = PROMPT[: data.draw(st.integers(5, 22))]
        chosen = data.draw(st.dictionaries(st.sampled_from([A, B]), st.integers(0, len(prompt)), max_size=2))
        each = request(prompt, *(AdapterUse(v, 1.0, begin) for v, begin in sorted(chosen.items())), name=str(at))
        each.num_computed_tokens = blocks.match_prefix(each)
        assert blocks.allocate_slots(each, len(prompt) - each.num_computed_tokens)
        each.num_computed_tokens = len(prompt)
        blocks.commit(each)
        history = [
            (token, tuple(AdapterUse(use.version) for use in each.adapters if use.active_from <= position))
            for position, token in enumerate(prompt)
        ]
        for index, block in enumerate(each.block_table[: len(prompt) // BLOCK]):
            assert holders.setdefault(block, history[: (index + 1) * BLOCK]) == history[: (index + 1) * BLOCK]
    blocks.check_integrity()
