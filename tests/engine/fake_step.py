"""A step without a model: fakes the device side of the scheduler and checks what a real one would rely on.

`FakeModel` draws the next token from all tokens before it and the adapters. `FakeKVCache` keeps, for each slot, the
whole history that wrote it, and asserts that what a row reads is its own history; so any fault in sharing, freeing
or reusing blocks fails at the step that would have read it.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from zlib import crc32

import pytest

from adapters.adapter_ref import AdapterUse, AdapterVersion
from server.config import SchedulerConfig
from server.engine.block_manager import BlockManager
from server.engine.request import FinishReason, Request, RequestOutput, RequestStatus, SampledToken, SamplingParams
from server.engine.scheduler import ScheduledRow, Scheduler
from server.engine.scheduler_output import SchedulerOutput
from server.errors import ContextLengthExceeded

VOCAB_SIZE = 6
History = tuple[tuple[AdapterUse, ...], tuple[int, ...]]


def use(name: str, weight: float = 1.0) -> AdapterUse:
    return AdapterUse(AdapterVersion(name), weight)


def make_request(
    request_id: str = "r",
    prompt: tuple[int, ...] = (1, 2, 3),
    *,
    max_tokens: int = 4,
    min_tokens: int = 0,
    stop_ids: tuple[int, ...] = (),
    adapters: tuple[AdapterUse, ...] = (),
    arrival_time: float = 0.0,
    prompt_logprobs: int | None = None,
    logprobs: int | None = None,
) -> Request:
    params = SamplingParams(
        max_tokens=max_tokens, min_tokens=min_tokens, prompt_logprobs=prompt_logprobs, logprobs=logprobs
    )
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling_params=params,
        stop_ids=frozenset(stop_ids),
        adapters=adapters,
        arrival_time=arrival_time,
    )


def next_token(request: Request) -> int:
    """A function of all tokens so far and the adapters; stop ids are masked while min_tokens holds."""
    history = (request.adapters, tuple(request.token_ids(0, request.num_tokens)))
    token = crc32(repr(history).encode()) % VOCAB_SIZE
    if request.num_output_tokens < request.sampling_params.min_tokens:
        while token in request.stop_ids:
            token = (token + 1) % VOCAB_SIZE
    return token


def solo_output(request: Request, max_model_len: int) -> list[int]:
    """What the request generates when nobody else is there; an oracle without scheduler or blocks."""
    params = request.sampling_params
    alone = Request(
        request_id="alone",
        prompt_token_ids=request.prompt_token_ids,
        sampling_params=params,
        stop_ids=request.stop_ids,
        adapters=request.adapters,
    )
    while alone.num_output_tokens < params.max_tokens and alone.num_tokens < max_model_len:
        token = next_token(alone)
        alone.output_token_ids.append(token)
        if token in request.stop_ids:
            break
    return alone.output_token_ids


@dataclass
class FakeResidency:
    """An adapter takes as many rows as its name is long; the least recently pinned goes first. A refused pin may
    leave some of its adapters pinned, as the real pool does."""

    num_rows: int = 1_000_000
    resident: OrderedDict[str, None] = field(default_factory=OrderedDict)
    pinned: set[str] = field(default_factory=set)
    num_pins: int = 0

    uses: Counter[str] = field(default_factory=Counter)

    needed: set[AdapterVersion] = field(default_factory=set)

    def begin_step(self, needed: Collection[AdapterVersion]) -> None:
        self.pinned.clear()
        self.needed = set(needed)

    def count_use(self, uses: tuple[AdapterUse, ...]) -> None:
        assert {use.version for use in uses} <= self.pinned
        self.uses.update(use.version for use in uses)

    def pin(self, uses: tuple[AdapterUse, ...]) -> bool:
        self.num_pins += 1
        return all(self._pin(use.version) for use in uses)

    def fits(self, uses: tuple[AdapterUse, ...]) -> bool:
        return sum(map(len, {use.version for use in uses})) <= self.num_rows

    def _pin(self, version: str) -> bool:
        if sum(map(len, self.pinned | {version})) > self.num_rows:
            return False
        self.pinned.add(version)
        self.resident[version] = None
        self.resident.move_to_end(version)
        while sum(map(len, self.resident)) > self.num_rows:
            del self.resident[next(v for v in self.resident if v not in self.pinned)]
        return True


class FakeKVCache:
    """slot → the adapters and all tokens up to and including the one whose K and V stand there."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._slots: dict[int, History] = {}

    def run(self, rows: tuple[ScheduledRow, ...]) -> None:
        """All reads before all writes: a row may not depend on what another writes in the same step."""
        for row in rows:
            for position in range(row.request.num_computed_tokens):
                slot, history = self._slot(row.request, position), self._history(row.request, position)
                assert self._slots.get(slot) == history, f"{row.request.request_id} reads another's slot {slot}"
        written = [
            (self._slot(row.request, position), self._history(row.request, position))
            for row in rows
            for position in range(row.request.num_computed_tokens, row.request.num_computed_tokens + row.num_new_tokens)
        ]
        assert len({slot for slot, _ in written}) == len(written), "two tokens of a step share a slot"
        self._slots.update(written)

    def _slot(self, request: Request, position: int) -> int:
        return request.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def _history(self, request: Request, position: int) -> History:
        return request.adapters, tuple(request.token_ids(0, position + 1))


class FakeEngine:
    """Runs steps of a real Scheduler and BlockManager, collecting every output by request id."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        num_rows: int = 1_000_000,
        max_model_len: int = 128,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.config = config or SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16)
        self.max_model_len = max_model_len
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.residency = FakeResidency(num_rows)
        self.scheduler = Scheduler(self.config, self.blocks, self.residency, max_model_len, clock=lambda: 7.0)
        self.kv_cache = FakeKVCache(block_size)
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}

    def add(self, request: Request) -> Request:
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []
        return request

    def add_if_it_fits(self, request: Request) -> None:
        """Add, and check that exactly the requests that need more slots than there are get refused."""
        params, num_prompt = request.sampling_params, request.num_prompt_tokens
        num_slots = max(num_prompt, min(num_prompt + params.max_tokens, self.max_model_len) - 1)
        if num_slots <= self.blocks.num_blocks * self.blocks.block_size:
            self.add(request)
            return
        with pytest.raises(ContextLengthExceeded):
            self.add(request)

    def step(self) -> SchedulerOutput:
        running = [request for request in self.requests.values() if request.status is RequestStatus.RUNNING]
        before = {request: request.num_tokens - request.num_computed_tokens for request in running}
        output = self.scheduler.schedule()
        self.check_step(output)
        self.check_nobody_left_out(before, output)
        self.kv_cache.run(output.rows)
        sampled = {r.request.request_id: SampledToken(next_token(r.request)) for r in output.rows if r.samples}
        self.collect(self.scheduler.update(output, sampled))
        return output

    def run(self, max_steps: int = 2000) -> None:
        """Step until every request has ended."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {max_steps} steps")

    def collect(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert not self.has_ended(output.request_id), f"{output.request_id} got an output after its last"
            self.outputs[output.request_id].append(output)

    def has_ended(self, request_id: str) -> bool:
        return any(output.finish_reason is not None for output in self.outputs[request_id])

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.new_token_ids]

    def check_end(self, request: Request, *, was_ended: bool) -> None:
        """One terminal output, and the tokens of the solo run: all of them, or the first ones when `was_ended`."""
        outputs, tokens = self.outputs[request.request_id], self.tokens(request.request_id)
        expected = solo_output(request, self.max_model_len)
        assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].finish_reason is request.status.finish_reason
        assert tokens == request.output_token_ids
        if was_ended:
            assert tokens == expected[: len(tokens)]
        elif not self.residency.fits(request.adapters):
            assert outputs[-1].finish_reason is FinishReason.ERROR and tokens == []
        else:
            is_stopped = bool(expected) and expected[-1] in request.stop_ids
            assert outputs[-1].finish_reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
            assert tokens == expected

    def check_nobody_left_out(self, lacks: dict[Request, int], output: SchedulerOutput) -> None:
        """Each request that ran before moves on, unless its blocks were taken, its adapters have lost their room, or it
        lacks several tokens and those that came before it took all the step may compute. `lacks` is by arrival.
        """
        scheduled = {row.request.request_id for row in output.rows}
        is_spent = False
        for request, num_behind in lacks.items():
            if not {use.version for use in request.adapters} <= self.residency.pinned:
                continue
            if request.request_id not in scheduled | set(output.preempted) and num_behind > 1:
                assert output.num_tokens == self.config.max_num_batched_tokens, f"{request.request_id} was left out"
                is_spent = True
                continue
            is_preempted = request.request_id in output.preempted
            assert is_preempted != (request.request_id in scheduled), f"{request.request_id} was left out"
            assert is_preempted or num_behind == 1 or not is_spent, f"{request.request_id} went before earlier ones"

    def check_step(self, output: SchedulerOutput) -> None:
        """The promises a step makes to the runner."""
        rows = output.rows
        assert len({row.request.request_id for row in rows}) == len(rows) <= self.config.max_num_seqs
        assert sum(row.num_new_tokens for row in rows) == output.num_tokens <= self.config.max_num_batched_tokens
        for row in rows:
            end = row.request.num_computed_tokens + row.num_new_tokens
            assert row.num_new_tokens > 0 and end <= row.request.num_tokens
            assert len(row.request.block_table) * self.blocks.block_size >= end
            assert {use.version for use in row.request.adapters} <= self.residency.pinned
        is_decoding = [row.num_new_tokens == 1 and row.samples for row in rows]
        assert is_decoding == [True] * output.num_decode_rows + [False] * (len(rows) - output.num_decode_rows)
        for group in (rows[: output.num_decode_rows], rows[output.num_decode_rows :]):
            adapters = [row.request.adapters for row in group]
            runs = [a for i, a in enumerate(adapters) if i == 0 or a != adapters[i - 1]]
            assert len(runs) == len(set(runs)), "rows of one adapter do not stand side by side"
