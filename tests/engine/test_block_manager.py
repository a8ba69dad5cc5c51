"""BlockManager and its prefix cache: who holds a block, what is found again, what is evicted first."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters.adapter_ref import AdapterUse
from server.engine.block_manager import BlockManager
from server.engine.request import Request
from tests.engine.fake_step import make_request, use


def compute(blocks: BlockManager, request: Request, num_tokens: int | None = None) -> None:
    """Allocate, as if computed, and commit all (or `num_tokens` more) of the known tokens."""
    num_new = request.num_tokens - request.num_computed_tokens if num_tokens is None else num_tokens
    assert blocks.allocate_slots(request, num_new)
    request.num_computed_tokens += num_new
    blocks.commit(request)


def serve(blocks: BlockManager, request_id: str, prompt: tuple[int, ...], *adapters: AdapterUse) -> Request:
    """Compute a prompt, prefix hits first; the request still holds its blocks."""
    request = make_request(request_id, prompt, adapters=adapters)
    request.num_computed_tokens = blocks.match_prefix(request)
    request.num_cached_tokens = request.num_computed_tokens
    compute(blocks, request)
    blocks.check_integrity()
    return request


def test_slots_cover_exactly_the_tokens_asked_for() -> None:
    blocks = BlockManager(8, 4)
    request = make_request(prompt=tuple(range(20)))
    assert blocks.allocate_slots(request, 4)
    assert len(request.block_table) == 1
    assert blocks.allocate_slots(request, 5)
    assert len(request.block_table) == 2
    request.num_computed_tokens = 5
    assert blocks.allocate_slots(request, 3)
    assert len(request.block_table) == 2
    assert blocks.num_free_slots(request) == 8 * 4 - 5


def test_refusal_changes_nothing() -> None:
    blocks = BlockManager(3, 4)
    first, second = make_request("first", tuple(range(8))), make_request("second", tuple(range(8)))
    assert blocks.allocate_slots(first, 8)
    assert not blocks.allocate_slots(second, 8)
    assert second.block_table == []
    assert blocks.num_free == 1
    blocks.check_integrity()


def test_prefix_is_found_with_one_token_left_to_compute() -> None:
    blocks = BlockManager(16, 4)
    first = serve(blocks, "first", (1,) * 8)
    longer = serve(blocks, "longer", (1,) * 10)
    same = serve(blocks, "same", (1,) * 8)
    assert longer.num_cached_tokens == 8
    assert longer.block_table[:2] == first.block_table
    assert same.num_cached_tokens == 4  # its second block would leave nothing to compute


def test_only_full_computed_blocks_are_found() -> None:
    blocks = BlockManager(16, 4)
    partly = make_request("partly", (1,) * 12)
    compute(blocks, partly, 6)
    assert serve(blocks, "other", (1,) * 12).num_cached_tokens == 4


def test_output_tokens_are_found_too() -> None:
    blocks = BlockManager(16, 4)
    first = serve(blocks, "first", (1, 2, 3))
    first.output_token_ids.extend([4, 5, 6])
    compute(blocks, first)
    blocks.forget(first)
    assert serve(blocks, "next", (1, 2, 3, 4, 5, 6)).num_cached_tokens == 4


@pytest.mark.parametrize(
    "other",
    [(), (use("b"),), (use("a", 0.5),), (use("a"), use("b")), (use("a"), use("a"))],
    ids=["base", "other version", "other weight", "composition", "twice"],
)
def test_prefix_of_other_adapters_is_never_found(other: tuple[AdapterUse, ...]) -> None:
    blocks = BlockManager(16, 4)
    serve(blocks, "first", (1,) * 9, use("a"))
    assert serve(blocks, "other", (1,) * 9, *other).num_cached_tokens == 0
    assert serve(blocks, "same", (1,) * 9, use("a")).num_cached_tokens == 8


def test_same_block_after_another_prefix_is_not_found() -> None:
    blocks = BlockManager(16, 4)
    serve(blocks, "first", (1, 1, 1, 1, 2, 2, 2, 2, 3))
    assert serve(blocks, "other", (9, 9, 9, 9, 2, 2, 2, 2, 3)).num_cached_tokens == 0


def test_prompt_logprobs_compute_the_whole_prompt_but_serve_others() -> None:
    blocks = BlockManager(16, 4)
    serve(blocks, "first", (1,) * 9)
    request = make_request("scored", (1,) * 9, prompt_logprobs=0)
    assert blocks.match_prefix(request) == 0
    assert request.block_table == []


def test_prefix_caching_off() -> None:
    blocks = BlockManager(16, 4, enable_prefix_caching=False)
    blocks.forget(serve(blocks, "first", (1,) * 9))
    assert serve(blocks, "second", (1,) * 9).num_cached_tokens == 0


def test_colliding_digests_serve_nobody_elses_tokens() -> None:
    """Every chain has the same digest, so only the comparison of contents keeps prompts and adapters apart."""
    blocks = BlockManager(32, 4, digest=lambda _: b"collision")
    serve(blocks, "first", (1, 1, 1, 1, 5), use("a"))
    assert serve(blocks, "tokens", (2, 2, 2, 2, 5), use("a")).num_cached_tokens == 0
    assert serve(blocks, "adapters", (1, 1, 1, 1, 5), use("b")).num_cached_tokens == 0
    assert serve(blocks, "same", (1, 1, 1, 1, 5), use("a")).num_cached_tokens == 4


def test_a_parent_that_collides_is_told_apart_from_the_true_one() -> None:
    """Two first blocks share a digest, so their second blocks with equal tokens share a whole key. Once the true
    parent is evicted and the false one takes its place, the orphaned second block must not be found behind it."""
    real = BlockManager(1, 4)._cache
    true, false = (1,) * 4, (2,) * 4
    tokens = {prompt: real.child(real.root(()), prompt).tokens for prompt in (true, false)}

    def digest(data: bytes) -> bytes:
        return b"planted" if any(data.endswith(t) for t in tokens.values()) else data[-64:]

    blocks = BlockManager(16, 4, digest=digest)
    first = serve(blocks, "first", (*true, 3, 3, 3, 3, 9))
    blocks._cache.remove(first.block_table[0])  # as eviction would
    assert serve(blocks, "second", (*false, 8)).num_cached_tokens == 0  # now stands for "planted"
    found = serve(blocks, "third", (*false, 3, 3, 3, 3, 9))
    assert found.num_cached_tokens == 4
    assert found.block_table[1] != first.block_table[1]


def test_an_equal_parent_computed_anew_leads_to_the_children_of_the_old_one() -> None:
    blocks = BlockManager(16, 4)
    first = serve(blocks, "first", (1, 1, 1, 1, 2, 2, 2, 2, 3))
    blocks._cache.remove(first.block_table[0])
    second = serve(blocks, "second", (1, 1, 1, 1, 7))
    third = serve(blocks, "third", (1, 1, 1, 1, 2, 2, 2, 2, 3))
    assert third.block_table[:2] == [second.block_table[0], first.block_table[1]]
    kept = blocks._cache._contents  # the orphan hangs on its new parent, so later comparisons end there
    assert kept[third.block_table[1]].parent is kept[third.block_table[0]]


def test_equal_blocks_computed_at_once_keep_one_mapping_and_free_cleanly() -> None:
    blocks = BlockManager(8, 4)
    twins = [make_request(name, (1,) * 5) for name in ("left", "right")]
    for twin in twins:
        assert blocks.match_prefix(twin) == 0
    for twin in twins:
        compute(blocks, twin)
    blocks.check_integrity()
    blocks.forget(twins[0])
    blocks.check_integrity()
    third = serve(blocks, "third", (1,) * 5)
    assert third.num_cached_tokens == 4
    blocks.forget(twins[1])
    blocks.forget(third)
    blocks.check_integrity()
    assert blocks.num_free == 8


def test_blocks_without_content_are_taken_before_cached_ones() -> None:
    blocks = BlockManager(4, 4)
    blocks.forget(serve(blocks, "first", (1,) * 5))  # leaves one block cached, three without content
    compute(blocks, make_request("other", (2,) * 12))
    assert blocks.match_prefix(make_request("again", (1,) * 5)) == 4


def test_the_end_of_the_longest_unused_chain_is_evicted_first() -> None:
    blocks = BlockManager(6, 4)
    blocks.forget(serve(blocks, "old", (1,) * 12))
    blocks.forget(serve(blocks, "new", (2,) * 12))
    compute(blocks, make_request("other", (3,) * 8))  # takes two blocks: the end of "old"
    assert blocks.match_prefix(make_request("new again", (2,) * 13)) == 12
    assert blocks.match_prefix(make_request("old again", (1,) * 13)) == 4


def test_a_hit_protects_a_cached_block_from_eviction() -> None:
    blocks = BlockManager(3, 4)
    blocks.forget(serve(blocks, "first", (1,) * 4))
    again = serve(blocks, "again", (1,) * 5)
    assert again.num_cached_tokens == 4
    assert not blocks.allocate_slots(make_request("other", (2,) * 8), 8)
    assert blocks.num_free == 1


def test_resumed_request_finds_what_it_computed_before() -> None:
    blocks = BlockManager(8, 4)
    request = serve(blocks, "r", (1,) * 9)
    blocks.free(request)
    request.num_computed_tokens = blocks.match_prefix(request)
    assert request.num_computed_tokens == 8
    blocks.check_integrity()


def test_a_found_block_stays_findable() -> None:
    blocks = BlockManager(8, 4)
    blocks.forget(serve(blocks, "first", (1,) * 9))
    for name in ("second", "third"):
        request = serve(blocks, name, (1,) * 9)
        assert request.num_cached_tokens == 8
        blocks.forget(request)


def test_a_resumed_request_with_prompt_logprobs_offers_its_blocks_again() -> None:
    blocks = BlockManager(4, 4)
    request = make_request("scored", (1,) * 8, prompt_logprobs=0)
    compute(blocks, request)
    blocks.free(request)
    request.num_computed_tokens = 0
    blocks.forget(serve(blocks, "other", (2,) * 16))  # evicts both
    compute(blocks, request)
    assert serve(blocks, "next", (1,) * 8).num_cached_tokens == 4


def test_distrusted_blocks_are_not_found_again_even_when_shared() -> None:
    blocks = BlockManager(8, 4)
    first = serve(blocks, "first", (1,) * 9)
    second = serve(blocks, "second", (1,) * 9)
    blocks.forget(first, keep_cached=False)
    blocks.check_integrity()
    assert blocks.match_prefix(make_request("third", (1,) * 9)) == 0
    blocks.forget(second)
    blocks.check_integrity()
    assert blocks.num_free == 8


def test_each_block_is_digested_once() -> None:
    calls: list[bytes] = []

    def digest(data: bytes) -> bytes:
        calls.append(data)
        return data[-64:] + bytes([len(calls)])

    blocks = BlockManager(8, 4, digest=digest)
    request = make_request(prompt=(1,) * 12)
    blocks.match_prefix(request)
    blocks.match_prefix(request)
    for _ in range(12):
        compute(blocks, request, 1)
    blocks.free(request)
    request.num_computed_tokens = 0
    blocks.match_prefix(request)
    assert len(calls) == 4  # the root and three blocks


def test_integrity_check_sees_a_lost_block_and_a_shared_writable_one() -> None:
    blocks = BlockManager(8, 4)
    request = serve(blocks, "r", (1,) * 6)
    blocks._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        blocks.check_integrity()
    blocks = BlockManager(8, 4)
    request = serve(blocks, "r", (1,) * 6)
    thief = serve(blocks, "thief", (2,) * 6)
    blocks._attach(thief, request.block_table[1])
    with pytest.raises(AssertionError, match="written to by r and shared"):
        blocks.check_integrity()


class BlockMachine(RuleBasedStateMachine):
    """Any order of calls; after each, every block is in one state and every hit is true to its content."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(10, 2)
        self.live: list[Request] = []
        self.written: dict[int, tuple[object, ...]] = {}  # block → what its full content is
        self.count = 0

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9), name=st.sampled_from(["", "a", "b"]))
    def admit(self, prompt: list[int], name: str) -> None:
        self.count += 1
        adapters = (use(name),) if name else ()
        request = make_request(str(self.count), tuple(prompt), adapters=adapters)
        request.num_computed_tokens = self.blocks.match_prefix(request)
        assert request.num_computed_tokens < request.num_tokens
        for index, block in enumerate(request.block_table):
            assert self.written[block] == self._content(request, index)
        self.live.append(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_tokens=st.integers(1, 5))
    def compute(self, data: st.DataObject, num_tokens: int) -> None:
        request = data.draw(st.sampled_from(self.live))
        free = self.blocks.num_free
        while request.num_tokens < request.num_computed_tokens + num_tokens:
            request.output_token_ids.append(self.count % 2)
        before = list(request.block_table)
        if not self.blocks.allocate_slots(request, num_tokens):
            assert request.block_table == before and self.blocks.num_free == free
            return
        request.num_computed_tokens += num_tokens
        for index in range(request.num_computed_tokens // 2):
            self.written[request.block_table[index]] = self._content(request, index)
        self.blocks.commit(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), how=st.sampled_from(["forget", "distrust", "preempt"]))
    def release(self, data: st.DataObject, how: str) -> None:
        request = data.draw(st.sampled_from(self.live))
        if how == "preempt":
            self.blocks.free(request)
            request.num_computed_tokens = self.blocks.match_prefix(request)
            return
        self.blocks.forget(request, keep_cached=how == "forget")
        self.live.remove(request)

    @invariant()
    def is_sound(self) -> None:
        self.blocks.check_integrity()
        assert self.blocks.holders <= {request.request_id for request in self.live}
        held = {block for request in self.live for block in request.block_table}
        assert self.blocks.num_free == 10 - len(held)
        assert self.blocks.usage == pytest.approx(len(held) / 10)

    def _content(self, request: Request, index: int) -> tuple[object, ...]:
        return request.adapters, tuple(request.token_ids(0, 2 * (index + 1)))


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class CollidingBlockMachine(BlockMachine):
    """The same with a digest of one bit: nothing but the comparison of contents stands between requests."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(10, 2, digest=lambda data: bytes([sum(data) % 2]))


TestCollidingBlockMachine = CollidingBlockMachine.TestCase
TestCollidingBlockMachine.settings = settings(TestBlockMachine.settings, max_examples=60)


def test_adapter_use_is_part_of_the_key_by_value() -> None:
    blocks = BlockManager(8, 4)
    serve(blocks, "first", (1,) * 5, use("a"))
    assert serve(blocks, "equal", (1,) * 5, replace(use("b"), version=use("a").version)).num_cached_tokens == 4
