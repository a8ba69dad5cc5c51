"""Scheduler and BlockManager under any order of events, tiny limits and a cache too small for everybody.

Whatever was chunked, preempted, shared, evicted, aborted or failed: each request ends exactly once, with the tokens
it generates alone, and no row ever reads a slot that another history wrote.
"""

from collections import Counter
from dataclasses import dataclass
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters.adapter_ref import AdapterUse
from server.config import SchedulerConfig
from server.engine.request import Request, RequestStatus
from tests.engine.fake_step import FakeEngine, make_request, use

MAX_MODEL_LEN = 24
ADAPTERS: list[tuple[AdapterUse, ...]] = [
    (),
    (),
    (use("a"),),
    (use("b"),),
    (use("a", 0.5),),
    (use("cc"),),
    (use("a"), use("b")),
    (use("a"), use("cc")),
]


@dataclass(frozen=True)
class DrawnRequest:
    prompt: tuple[int, ...]
    adapters: tuple[AdapterUse, ...]
    max_tokens: int
    min_tokens: int
    stop_ids: tuple[int, ...]
    prompt_logprobs: int | None

    def named(self, number: int) -> Request:
        return make_request(
            str(number),
            self.prompt,
            adapters=self.adapters,
            max_tokens=self.max_tokens,
            min_tokens=min(self.min_tokens, self.max_tokens),
            stop_ids=self.stop_ids,
            prompt_logprobs=self.prompt_logprobs,
            arrival_time=float(number // 2),  # some arrive together, as the n of one HTTP request do
        )


REQUESTS = st.builds(
    DrawnRequest,
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple),
    adapters=st.sampled_from(ADAPTERS),
    max_tokens=st.integers(0, 12),
    min_tokens=st.integers(0, 2),
    stop_ids=st.sampled_from([(), (), (0,), (1, 2)]),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 12),
        num_blocks=st.integers(5, 12),
        block_size=st.sampled_from([1, 2, 3, 4]),
        num_rows=st.integers(1, 4),
        max_bypassed_steps=st.integers(0, 3),
        enable_prefix_caching=st.booleans(),
        first=st.lists(REQUESTS, min_size=2, max_size=8),
    )
    def start(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_blocks: int,
        block_size: int,
        num_rows: int,
        max_bypassed_steps: int,
        enable_prefix_caching: bool,
        first: list[DrawnRequest],
    ) -> None:
        self.engine = FakeEngine(
            SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_bypassed_steps=max_bypassed_steps,
            ),
            num_blocks=num_blocks,
            block_size=block_size,
            num_rows=num_rows,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.ended_by_us: set[str] = set()
        self.add(first)

    @rule(drawn=st.lists(REQUESTS, min_size=1, max_size=4))
    def add(self, drawn: list[DrawnRequest]) -> None:
        for request in drawn:
            self.engine.add_if_it_fits(request.named(len(self.engine.requests)))

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()
            self.is_sound()

    @rule()
    def step_that_never_reports(self) -> None:
        output = self.engine.scheduler.schedule()
        self.engine.check_step(output)

    @rule()
    def step_that_fails(self) -> None:
        output = self.engine.scheduler.schedule()
        failed = [row.request.request_id for row in output.rows]
        self.ended_by_us.update(failed)
        self.engine.collect(self.engine.scheduler.fail(failed, "the step failed"))

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data: st.DataObject, fails: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.engine.requests)))
        had_ended = self.engine.requests[name].status.is_finished
        if fails:
            outputs = self.engine.scheduler.fail([name], "failed")
        else:
            output = self.engine.scheduler.abort(name)
            outputs = [output] if output else []
        assert any(output.request_id == name for output in outputs) or had_ended
        if not had_ended:
            self.ended_by_us.add(name)
        self.engine.collect(outputs)

    @invariant()
    def is_sound(self) -> None:
        self.engine.scheduler.check_integrity()
        held = {block for request in self.running for block in request.block_table}
        assert self.engine.blocks.num_free == self.engine.blocks.num_blocks - len(held)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.scheduler.has_work:
            self.step(1)
            assert sum(map(len, self.engine.outputs.values())) < 10_000
        assert self.engine.blocks.num_free == self.engine.blocks.num_blocks
        assert not self.engine.blocks.holders
        for request in self.engine.requests.values():
            self.engine.check_end(request, was_ended=request.request_id in self.ended_by_us)

    @property
    def running(self) -> list[Request]:
        return [r for r in self.engine.requests.values() if r.status is RequestStatus.RUNNING]


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def draw_request(random: Random) -> DrawnRequest:
    shared = (0, 1, 0, 0, 1, 1, 0, 1, 0, 1)[: random.randrange(11)]
    return DrawnRequest(
        prompt=shared + tuple(random.choices((0, 1), k=random.randint(1, 5))),
        adapters=random.choice(ADAPTERS),
        max_tokens=random.randrange(13),
        min_tokens=random.randrange(3),
        stop_ids=random.choice([(), (), (), (0,)]),
        prompt_logprobs=random.choice([None, None, None, 0]),
    )


def soak(random: Random, seen: Counter[str]) -> None:
    """One engine with random limits under random arrivals and aborts; counts in `seen` what it went through."""
    limits = SchedulerConfig(
        max_num_seqs=random.randint(2, 6),
        max_num_batched_tokens=random.randint(2, 16),
        max_bypassed_steps=random.randrange(4),
    )
    block_size = random.randint(1, 4)
    engine = FakeEngine(
        limits,
        num_blocks=24 // block_size + random.randrange(8),
        block_size=block_size,
        num_rows=random.randint(2, 4),
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=random.random() < 0.8,
    )
    aborted: set[str] = set()
    for _ in range(60):
        if random.random() < 0.4:
            engine.add_if_it_fits(draw_request(random).named(len(engine.requests)))
        if engine.requests and random.random() < 0.05:
            name = random.choice(sorted(engine.requests))
            output = engine.scheduler.abort(name)
            engine.collect([output] if output else [])
            aborted |= {name} if output else set()
        count_events(engine, seen)
    engine.run()
    for request in engine.requests.values():
        engine.check_end(request, was_ended=request.request_id in aborted)
    stats = engine.scheduler.stats()
    seen.update(preempted=stats.num_preemptions, prefix_hits=stats.prefix_hits, ended=len(engine.requests))


def count_events(engine: FakeEngine, seen: Counter[str]) -> None:
    """Step once, checking integrity, and note the rarer things that happened."""
    output = engine.step()
    engine.scheduler.check_integrity()
    running = [r for r in engine.requests.values() if r.status is RequestStatus.RUNNING]
    waiting = [r for r in engine.requests.values() if r.status is RequestStatus.WAITING]
    chunks = [row for row in output.rows if row.num_new_tokens > 1 and not row.samples]
    seen["chunked beside decoding"] += bool(chunks) and output.num_decode_rows > 0
    seen["overtaken"] += any(w.arrival_time < r.arrival_time for w in waiting for r in running)
    seen["resumed"] += any(row.request.num_preemptions and row.num_new_tokens > 1 for row in output.rows)
    seen["shared"] += any(count > 1 for count in Counter(b for r in running for b in r.block_table).values())


def test_soak_goes_through_everything_and_every_request_ends_as_alone() -> None:
    seen: Counter[str] = Counter()
    for seed in range(120):
        soak(Random(seed), seen)
    expected = ["preempted", "prefix_hits", "chunked beside decoding", "overtaken", "resumed", "shared"]
    assert all(seen[event] >= 50 for event in expected), seen
    assert seen["ended"] > 2000
