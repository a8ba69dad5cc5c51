"""Scheduler by example: who is in a step, who waits, how requests end. `test_scheduler_machine` has the rest."""

from random import Random
from time import perf_counter

import pytest

from server.config import SchedulerConfig
from server.engine.request import FinishReason, Request, RequestStatus, SampledToken, TokenLogprob
from server.engine.request_queues import RequestQueues
from server.engine.scheduler_output import SchedulerOutput
from server.errors import BadRequest, ContextLengthExceeded
from tests.engine.fake_step import FakeEngine, make_request, next_token, solo_output, use


def config(max_num_seqs: int = 8, max_num_batched_tokens: int = 16, max_bypassed_steps: int = 3) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_bypassed_steps=max_bypassed_steps,
    )


def shape(output: SchedulerOutput) -> list[tuple[str, int]]:
    return [(row.request.request_id, row.num_new_tokens) for row in output.rows]


def test_a_request_from_prompt_to_last_token() -> None:
    engine = FakeEngine()
    request = engine.add(make_request("r", (1, 2, 3), max_tokens=3))
    assert shape(engine.step()) == [("r", 3)]
    assert shape(engine.step()) == [("r", 1)]
    engine.run()
    outputs = engine.outputs["r"]
    assert engine.tokens("r") == solo_output(request, 128)
    assert [output.finish_reason for output in outputs] == [None, None, FinishReason.LENGTH]
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert outputs[0].first_scheduled_time == outputs[-1].first_scheduled_time == 7.0
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert not engine.scheduler.has_work


def test_long_prompt_is_computed_in_chunks_beside_decoding_rows() -> None:
    engine = FakeEngine(config(max_num_batched_tokens=8))
    engine.add(make_request("short", (1,), max_tokens=9))
    engine.step()
    engine.add(make_request("long", tuple(range(20)), max_tokens=2))
    assert [shape(engine.step()) for _ in range(4)] == [
        [("short", 1), ("long", 7)],
        [("short", 1), ("long", 7)],
        [("short", 1), ("long", 6)],
        [("short", 1), ("long", 1)],
    ]


def test_a_new_request_takes_nothing_from_a_running_prompt() -> None:
    engine = FakeEngine(config(max_num_batched_tokens=8))
    engine.add(make_request("long", tuple(range(30)), max_tokens=1))
    engine.step()
    engine.add(make_request("short", (1,), max_tokens=4))
    assert [shape(engine.step()) for _ in range(3)] == [[("long", 8)], [("long", 8)], [("short", 1), ("long", 6)]]


def test_decoding_rows_come_before_the_prompt_of_an_older_request() -> None:
    engine = FakeEngine(config(max_num_batched_tokens=8), num_rows=1)
    engine.add(make_request("first", (1,), max_tokens=2, adapters=(use("b"),)))
    engine.add(make_request("long", tuple(range(30)), adapters=(use("a"),), arrival_time=1.0))
    engine.add(make_request("short", (1,), max_tokens=9, arrival_time=2.0))
    assert shape(engine.step()) == [("first", 1), ("short", 1)]
    engine.step()
    assert [shape(engine.step()) for _ in range(2)] == [[("short", 1), ("long", 7)]] * 2


def test_waiting_is_first_come_first_served_within_max_num_seqs() -> None:
    engine = FakeEngine(config(max_num_seqs=2))
    for name in "abcd":
        engine.add(make_request(name, (1, 2), max_tokens=2))
    assert shape(engine.step()) == [("a", 2), ("b", 2)]
    engine.step()
    assert shape(engine.step()) == [("c", 2), ("d", 2)]


def test_nobody_overtakes_a_request_that_waits_for_blocks() -> None:
    engine = FakeEngine(num_blocks=4, block_size=4)
    engine.add(make_request("first", (1,) * 8, max_tokens=5))
    engine.step()
    engine.add(make_request("big", (2,) * 12, max_tokens=2))
    engine.add(make_request("small", (3,), max_tokens=2))
    assert shape(engine.step()) == [("first", 1)]
    engine.run()
    assert engine.requests["big"].num_preemptions == 0
    assert engine.tokens("big") == solo_output(engine.requests["big"], 128)


def test_the_latest_arrival_is_preempted_and_ends_with_the_same_tokens() -> None:
    engine = FakeEngine(num_blocks=6, block_size=4, enable_prefix_caching=False)
    old = engine.add(make_request("old", (1,) * 4, max_tokens=14, arrival_time=1.0))
    new = engine.add(make_request("new", (2,) * 4, max_tokens=14, arrival_time=2.0))
    preempted: list[str] = []
    while engine.scheduler.has_work:
        preempted.extend(engine.step().preempted)
        engine.scheduler.check_integrity()
    assert set(preempted) == {"new"}
    assert old.num_preemptions == 0 < new.num_preemptions
    assert engine.scheduler.stats().num_preemptions == len(preempted)
    for request in (old, new):
        assert engine.tokens(request.request_id) == solo_output(request, 128)


def test_queues_are_by_arrival_with_preempted_requests_first() -> None:
    queues = RequestQueues()
    requests = {name: make_request(name, arrival_time=arrival) for arrival, name in enumerate("abcde")}
    for name in "abcde":
        queues.add(requests[name])
    for name in "cadb":  # "e" keeps waiting
        queues.start(requests[name])
        queues.check_integrity()
    assert [request.request_id for request in queues.running] == ["a", "b", "c", "d"]
    assert [queues.preempt_latest().request_id for _ in range(2)] == ["d", "c"]
    queues.start(requests["c"])
    queues.preempt_latest()
    queues.preempt_latest()
    queues.check_integrity()
    assert [request.request_id for request in queues.waiting] == ["b", "c", "d", "e"]


def contended_prompt() -> FakeEngine:
    """An older request ("long", 12 tokens in chunks of 2) beside a younger one that decodes; 17 slots for both."""
    engine = FakeEngine(config(max_num_batched_tokens=3), num_blocks=17, block_size=1, num_rows=1)
    engine.add(make_request("first", (7,), max_tokens=1, adapters=(use("b"),)))
    engine.add(make_request("long", tuple(range(12)), max_tokens=4, adapters=(use("a"),), arrival_time=1.0))
    engine.add(make_request("short", (8,), max_tokens=12, arrival_time=2.0))
    engine.step()
    return engine


def test_a_row_already_scheduled_is_taken_out_when_its_request_is_preempted() -> None:
    engine = contended_prompt()
    while not (output := engine.step()).preempted:
        pass
    assert output.preempted == ("short",)
    assert [name for name, _ in shape(output)] == ["long"]
    engine.run()
    for name in ("long", "short"):
        assert engine.tokens(name) == solo_output(engine.requests[name], 128)


def test_a_chunk_shrinks_to_the_free_blocks_before_anybody_is_preempted() -> None:
    engine = contended_prompt()
    engine.step()
    thief = make_request("thief", (9,) * 20)
    assert engine.blocks.allocate_slots(thief, engine.blocks.num_free - 2)
    output = engine.step()
    assert shape(output) == [("short", 1), ("long", 1)] and output.preempted == ()
    engine.blocks.forget(thief)


def test_a_new_request_leaves_a_spare_block_to_each_running_one() -> None:
    engine = FakeEngine(num_blocks=4, block_size=4)
    engine.add(make_request("runs", (1,) * 2, max_tokens=2))
    engine.step()
    engine.add(make_request("waits", (2,) * 9, max_tokens=1))  # three blocks: all that are free
    assert shape(engine.step()) == [("runs", 1)]
    assert shape(engine.step()) == [("waits", 9)]


def test_a_cached_prefix_is_not_computed_again() -> None:
    engine = FakeEngine()
    engine.add(make_request("first", (1,) * 10, max_tokens=1))
    engine.run()
    engine.add(make_request("second", (1,) * 10, max_tokens=1))
    assert shape(engine.step()) == [("second", 2)]
    assert engine.outputs["second"][0].num_cached_tokens == 8
    stats = engine.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (20, 8)


def test_rows_of_one_adapter_stand_side_by_side_and_decoding_rows_come_first() -> None:
    engine = FakeEngine(config(max_num_batched_tokens=64))
    for name, adapter in (("1", "a"), ("2", "b"), ("3", "a"), ("4", "b")):
        engine.add(make_request(name, (1, 2), max_tokens=9, adapters=(use(adapter),)))
    assert [name for name, _ in shape(engine.step())] == ["1", "3", "2", "4"]
    engine.add(make_request("5", (1, 2), adapters=(use("a"),)))
    engine.add(make_request("6", (1,), adapters=(use("b"),)))
    output = engine.step()
    assert [name for name, _ in shape(output)] == ["1", "3", "2", "4", "6", "5"]
    assert output.num_decode_rows == 5


class TestEnd:
    def test_stop_id_is_the_last_token_and_named(self) -> None:
        engine = FakeEngine()
        free = make_request("free", (1, 2), max_tokens=8)
        stop = solo_output(free, 128)[2]
        request = engine.add(make_request("r", (1, 2), max_tokens=8, stop_ids=(stop,)))
        engine.run()
        assert engine.tokens("r") == solo_output(request, 128)
        last = engine.outputs["r"][-1]
        assert (last.finish_reason, last.stop_token_id, last.new_token_ids) == (FinishReason.STOP, stop, (stop,))

    def test_stop_id_counts_only_after_min_tokens(self) -> None:
        engine = FakeEngine()
        engine.add(make_request("r", (1,), max_tokens=4, min_tokens=2, stop_ids=(5,)))
        for expected in (None, None, FinishReason.STOP):
            output = engine.scheduler.schedule()
            (sent,) = engine.scheduler.update(output, {"r": SampledToken(5)})
            assert sent.finish_reason is expected

    def test_max_model_len(self) -> None:
        engine = FakeEngine(max_model_len=6)
        engine.add(make_request("r", (1,) * 4, max_tokens=50))
        engine.run()
        assert len(engine.tokens("r")) == 2
        assert engine.outputs["r"][-1].finish_reason is FinishReason.LENGTH

    def test_max_tokens_0_computes_the_prompt_and_samples_nothing(self) -> None:
        engine = FakeEngine(config(max_num_batched_tokens=4))
        engine.add(make_request("r", (1,) * 6, max_tokens=0))
        for _ in range(2):
            output = engine.step()
            assert not output.rows[0].samples and output.num_decode_rows == 0
        (sent,) = engine.outputs["r"]
        assert (sent.new_token_ids, sent.finish_reason) == ((), FinishReason.LENGTH)
        assert not engine.scheduler.has_work

    def test_logprobs_and_prompt_logprobs_are_handed_on(self) -> None:
        engine = FakeEngine()
        engine.add(make_request("r", (1, 2), max_tokens=2, logprobs=0, prompt_logprobs=0))
        drawn, of_prompt = TokenLogprob(3, -1.0), (None, TokenLogprob(2, -0.5))
        sampled = {"r": SampledToken(3, drawn)}
        (first,) = engine.scheduler.update(engine.scheduler.schedule(), sampled, {"r": of_prompt})
        (second,) = engine.scheduler.update(engine.scheduler.schedule(), sampled)
        assert (first.logprobs, first.prompt_logprobs) == ((drawn,), of_prompt)
        assert (second.logprobs, second.prompt_logprobs) == ((drawn,), None)


class TestAbortAndFail:
    def test_abort_while_waiting_running_preempted_and_ended(self) -> None:
        engine = FakeEngine(num_blocks=6, block_size=4)
        for arrival, name in enumerate(("old", "new"), 1):
            engine.add(make_request(name, (arrival,) * 4, max_tokens=14, arrival_time=arrival))
        while not engine.step().preempted:
            pass
        engine.add(make_request("waiting", arrival_time=3.0))
        for name in ("waiting", "new", "old"):
            output = engine.scheduler.abort(name)
            assert output is not None and output.finish_reason is FinishReason.ABORT
            assert engine.scheduler.abort(name) is None
            engine.scheduler.check_integrity()
        assert engine.scheduler.abort("unknown") is None
        assert engine.blocks.num_free == 6 and not engine.scheduler.has_work

    def test_abort_between_schedule_and_update_is_passed_over(self) -> None:
        engine = FakeEngine()
        gone, stays = engine.add(make_request("gone")), engine.add(make_request("stays"))
        output = engine.scheduler.schedule()
        assert engine.scheduler.abort("gone") is not None
        sampled = {"stays": SampledToken(next_token(stays))}
        assert [sent.request_id for sent in engine.scheduler.update(output, sampled)] == ["stays"]
        assert gone.output_token_ids == [] and gone.block_table == []
        engine.scheduler.check_integrity()

    def test_fail_ends_with_the_message_and_forgets_what_was_computed(self) -> None:
        engine = FakeEngine()
        engine.add(make_request("r", (1,) * 10))
        engine.step()
        (output,) = engine.scheduler.fail(["r", "unknown"], "the step failed")
        assert (output.finish_reason, output.error) == (FinishReason.ERROR, "the step failed")
        assert engine.scheduler.fail(["r"], "again") == []
        engine.add(make_request("next", (1,) * 10))
        assert shape(engine.step()) == [("next", 10)]
        engine.scheduler.check_integrity()

    def test_the_rows_of_a_step_that_never_reported_are_scheduled_again(self) -> None:
        engine = FakeEngine()
        request = engine.add(make_request("r", (1,) * 5))
        engine.scheduler.schedule()
        assert shape(engine.step()) == [("r", 5)]
        engine.run()
        assert engine.tokens("r") == solo_output(request, 128)


class TestAdd:
    def test_more_than_the_cache_holds_is_refused_with_the_way_out(self) -> None:
        engine = FakeEngine(num_blocks=4, block_size=4, max_model_len=64)
        with pytest.raises(ContextLengthExceeded, match=r"max_tokens=12 .* 17 .* holds 16; .*--kv-cache-memory"):
            engine.add(make_request("r", (1,) * 6, max_tokens=12))
        assert not engine.scheduler.has_work

    def test_exactly_what_the_cache_holds_runs(self) -> None:
        engine = FakeEngine(num_blocks=4, block_size=4, max_model_len=64)
        engine.add(make_request("r", (1,) * 6, max_tokens=11))  # the last token sampled needs no slot
        engine.add(make_request("all", (2,) * 16, max_tokens=0))
        engine.run()
        assert len(engine.tokens("r")) == 11

    @pytest.mark.parametrize(("max_tokens", "longest"), [(0, 8), (1, 7), (5, 7)])
    def test_longest_prompt(self, max_tokens: int, longest: int) -> None:
        engine = FakeEngine(max_model_len=8)
        engine.add(make_request("fits", (1,) * longest, max_tokens=max_tokens))
        with pytest.raises(ContextLengthExceeded, match=f"{longest + 1} tokens"):
            engine.add(make_request("over", (1,) * (longest + 1), max_tokens=max_tokens))

    def test_empty_prompt_and_used_id(self) -> None:
        engine = FakeEngine()
        with pytest.raises(BadRequest, match="0 tokens"):
            engine.add(make_request("r", ()))
        engine.add(make_request("r"))
        with pytest.raises(BadRequest, match="in use"):
            engine.scheduler.add(make_request("r"))


class TestAdapterRoom:
    def test_a_request_without_room_is_passed_by_those_behind_it(self) -> None:
        engine = FakeEngine(num_rows=1)
        engine.add(make_request("1", max_tokens=4, adapters=(use("a"),)))
        engine.add(make_request("2", (1, 2), adapters=(use("b"),)))
        engine.add(make_request("3", (1, 2), adapters=(use("a"),)))
        engine.add(make_request("4", (1, 2)))
        assert [name for name, _ in shape(engine.step())] == ["1", "3", "4"]
        engine.run()
        assert all(engine.tokens(name) for name in "1234")

    def test_a_stream_of_resident_adapters_starves_nobody(self) -> None:
        """A, B, A, A, …: with one more A in every step, B still runs soon after its bypassed steps are used up."""
        engine = FakeEngine(config(max_bypassed_steps=5), num_rows=1)
        engine.add(make_request("a0", (1,), max_tokens=3, adapters=(use("a"),), arrival_time=-2.0))
        starved = engine.add(make_request("b", (1,), max_tokens=2, adapters=(use("b"),), arrival_time=-1.0))
        steps = 0
        while starved.first_scheduled_time is None and steps < 30:
            steps += 1
            engine.add(make_request(f"a{steps}", (1,), max_tokens=3, adapters=(use("a"),), arrival_time=steps))
            engine.step()
            engine.scheduler.check_integrity()
        assert steps == 5 + 3  # passed over five times, then those admitted in the fifth step run out

    @pytest.mark.parametrize("max_bypassed_steps", [0, 5, 20])
    def test_popular_adapters_starve_no_rare_one(self, max_bypassed_steps: int) -> None:
        """The rare ones are wide, so that room never comes by itself: whoever waits gets in after those ahead."""
        num_clients, max_tokens = 12, 6
        waits = zipf_waits(max_bypassed_steps, num_clients=num_clients, max_tokens=max_tokens)
        assert max(waits) <= max_bypassed_steps + (num_clients - 1) * (max_tokens + 1)
        assert max(zipf_waits(10**9, num_clients=num_clients, max_tokens=max_tokens)) > 400, "nobody would have starved"

    def test_a_request_is_one_use_however_often_it_is_preempted(self) -> None:
        engine = FakeEngine(num_blocks=6, block_size=4, enable_prefix_caching=False)
        for arrival, name in enumerate("ab", 1):
            engine.add(make_request(name, (arrival,) * 4, max_tokens=14, adapters=(use(name),), arrival_time=arrival))
        engine.run()
        assert engine.requests["b"].num_preemptions > 0
        assert engine.residency.uses == {"a": 1, "b": 1}

    def test_what_the_head_of_the_queue_needs_is_told(self) -> None:
        engine = FakeEngine(config(max_num_seqs=2))
        for name in "abcde":
            engine.add(make_request(name, (1,), max_tokens=2, adapters=(use(name),)))
        engine.step()
        assert engine.residency.needed == {"a", "b"}
        engine.step()
        assert engine.residency.needed == {"c", "d"} and engine.residency.pinned == {"a", "b"}
        engine.run()
        assert engine.residency.needed == set()

    def test_base_requests_pass_a_starving_one(self) -> None:
        engine = FakeEngine(config(max_bypassed_steps=0), num_rows=1)
        engine.add(make_request("1", max_tokens=9, adapters=(use("a"),)))
        engine.add(make_request("2", adapters=(use("b"),)))
        engine.add(make_request("3", (1, 2), adapters=(use("a"),)))
        engine.add(make_request("4", (1, 2)))
        assert [name for name, _ in shape(engine.step())] == ["1", "4"]

    def test_adapters_that_never_fit_end_with_an_error_and_block_nobody(self) -> None:
        engine = FakeEngine(num_rows=2)
        engine.add(make_request("runs", (1,), adapters=(use("a"), use("b"))))
        engine.step()
        engine.add(make_request("never", (1,), adapters=(use("a"), use("b"), use("c"))))
        engine.add(make_request("later", (1,), adapters=(use("c"),)))
        engine.run()
        (output,) = engine.outputs["never"]
        assert output.finish_reason is FinishReason.ERROR
        assert output.error is not None and "--lora-memory" in output.error
        assert engine.outputs["later"][-1].finish_reason is FinishReason.LENGTH

    def test_the_end_of_a_refused_request_is_sent_even_when_nothing_runs(self) -> None:
        engine = FakeEngine(num_rows=1)
        engine.add(make_request("never", adapters=(use("ab"),)))
        output = engine.step()
        assert output.rows == () and output.finished == ("never",)
        assert engine.has_ended("never") and not engine.scheduler.has_work

    def test_the_second_refusal_of_a_step_is_not_taken_for_final(self) -> None:
        """A refused composition may leave one of its adapters pinned, in the way of the next request."""
        engine = FakeEngine(num_rows=1)
        engine.add(make_request("never", (1,), adapters=(use("a"), use("b"))))
        engine.add(make_request("fits", (1,), adapters=(use("c"),)))
        engine.run()
        assert engine.outputs["never"][-1].finish_reason is FinishReason.ERROR
        assert engine.outputs["fits"][-1].finish_reason is FinishReason.LENGTH

    def test_a_running_request_without_room_sits_out_and_nothing_takes_its_place(self) -> None:
        engine = FakeEngine(num_rows=2)
        engine.add(make_request("1", (1,), max_tokens=3, adapters=(use("a"),)))
        engine.add(make_request("2", (1,), max_tokens=3, adapters=(use("b"),)))
        engine.step()
        engine.residency.num_rows = 1  # as if the pools had shrunk
        engine.add(make_request("3", (1,), adapters=(use("a"),)))
        assert [name for name, _ in shape(engine.step())] == ["1"]
        engine.run()
        assert engine.requests["2"].num_preemptions == 0
        assert all(len(engine.tokens(name)) == engine.requests[name].sampling_params.max_tokens for name in "123")

    def test_each_set_of_adapters_is_pinned_once_a_step(self) -> None:
        engine = FakeEngine(num_rows=1)
        for i in range(6):
            engine.add(make_request(str(i), (1,), adapters=(use("ab"[i % 2]),)))
        engine.step()
        assert engine.residency.num_pins == 2


def zipf_waits(max_bypassed_steps: int, *, num_clients: int, max_tokens: int) -> list[int]:
    """Steps from arrival to the first scheduled row, or to now, of each request: every client asks again at once for
    an adapter drawn by place, and there is room for three narrow ones."""
    random = Random(1)
    limits = config(max_num_seqs=num_clients, max_num_batched_tokens=64, max_bypassed_steps=max_bypassed_steps)
    engine = FakeEngine(limits, num_blocks=1000, num_rows=3)
    arrivals: dict[str, int] = {}
    waits: dict[str, int] = {}
    for step in range(1500):
        live = sum(not request.status.is_finished for request in engine.requests.values())
        for _ in range(num_clients - live):
            (name,) = random.choices("a b c d e f g h ii jj kk lll".split(), [(place + 1) ** -2 for place in range(12)])
            request_id = str(len(engine.requests))
            arrivals[request_id] = step
            num_tokens = random.randint(1, max_tokens)
            engine.add(make_request(request_id, (1,), max_tokens=num_tokens, adapters=(use(name),), arrival_time=step))
        for row in engine.step().rows:
            waits.setdefault(row.request.request_id, step - arrivals[row.request.request_id])
    return [waits.get(request_id, 1500 - arrival) for request_id, arrival in arrivals.items()]


def test_stats_name_the_versions_that_run_and_wait() -> None:
    engine = FakeEngine(config(max_num_seqs=1))
    engine.add(make_request("1", adapters=(use("b"), use("a"))))
    engine.add(make_request("2", adapters=(use("c"),)))
    engine.add(make_request("3"))
    stats = engine.scheduler.stats(engine.step())
    assert (stats.num_running, stats.num_waiting, stats.num_step_tokens) == (1, 2, 3)
    assert (stats.num_step_rows, stats.num_step_adapters) == (1, 2)
    assert (stats.running_versions, stats.waiting_versions) == (("a", "b"), ("c",))
    assert stats.kv_usage == 1 / 64
    idle = engine.scheduler.stats()
    assert (idle.num_step_tokens, idle.num_step_rows, idle.num_step_adapters) == (0, 0, 0)


def decoding_step_seconds(engine: FakeEngine, num_rows: int, num_steps: int = 100) -> float:
    """The least of many schedule and update calls, so that a busy machine does not decide."""
    tokens = {name: SampledToken(0) for name in engine.requests}
    durations = []
    for _ in range(num_steps):
        begin = perf_counter()
        output = engine.scheduler.schedule()
        outputs = engine.scheduler.update(output, tokens)
        durations.append(perf_counter() - begin)
        assert len(outputs) == output.num_decode_rows == num_rows
    return min(durations)


def decoding_engine(num_rows: int, num_prompt_tokens: int) -> FakeEngine:
    limits = config(max_num_seqs=num_rows, max_num_batched_tokens=8192)
    engine = FakeEngine(limits, num_blocks=20_000, block_size=16, max_model_len=20_000)
    for i in range(num_rows):
        prompt = (i,) * num_prompt_tokens
        engine.add(make_request(str(i), prompt, max_tokens=500, adapters=(use("abcdefgh"[i % 8]),)))
    while (output := engine.scheduler.schedule()).num_decode_rows < num_rows:
        engine.scheduler.update(output, {name: SampledToken(0) for name in engine.requests})
    return engine


def test_a_decoding_step_does_not_grow_with_what_came_before() -> None:
    """Work in proportion to the history would cost hundreds of times as much after 16,000 tokens as after 16."""
    short, long = decoding_engine(8, 16), decoding_engine(8, 16_000)
    assert decoding_step_seconds(long, 8) < 20 * decoding_step_seconds(short, 8)


def test_requests_are_told_apart_by_identity() -> None:
    left, right = make_request("same"), make_request("same")
    assert left != right and isinstance(left, Request)
