"""Decides which tokens of which requests the next step computes. No tensors, no text, no wire, no locks.

There is no prefill and no decode: in every step `num_computed_tokens` of each request chases `num_tokens` under one
token budget, so chunked prefill, prefix hits and resumption after preemption are the same line. Running requests come
first (those one token behind before those with more to compute), then waiting ones in order of arrival, preempted
ones ahead. Whoever finds no block takes those of the latest arrival, so the earliest always moves on.
"""

from collections.abc import Callable, Iterable, Mapping
from time import monotonic

from server.config import SchedulerConfig
from server.engine.adapter_room import AdapterRoom, Room
from server.engine.adapter_room import Residency as Residency
from server.engine.block_manager import BlockManager
from server.engine.request import EngineStats, Request, RequestOutput, RequestStatus, SampledToken, TokenLogprob
from server.engine.request_limits import RequestLimits
from server.engine.request_queues import RequestQueues
from server.engine.scheduler_output import (
    PENDING_TOKEN_ID,
    SchedulerOutput,
    StepDraft,
    has_pending_token,
    terminal_output,
)
from server.engine.scheduler_output import ScheduledRow as ScheduledRow
from server.errors import BadRequest

PromptLogprobs = tuple[TokenLogprob | None, ...]


class Scheduler:
    """Owns the mutable part of every request from `add` to its one terminal RequestOutput."""

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        residency: Residency,
        max_model_len: int,
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self._limits = RequestLimits(max_model_len, capacity=blocks.num_blocks * blocks.block_size)
        self._clock = clock
        self._room = AdapterRoom(residency, config.max_bypassed_steps)
        self._queues = RequestQueues()
        self._unsent: list[RequestOutput] = []  # terminal outputs of requests that ended in schedule()
        self._ahead: SchedulerOutput | None = None  # the step counted by `advance` whose tokens are not known yet
        self._num_preemptions = self._prefix_queries = self._prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self._queues or self._unsent)

    def add(self, request: Request) -> None:
        """Queue a request. BadRequest for an empty prompt or an id in use, ContextLengthExceeded when the request
        could not run even alone; nothing changed then."""
        self._limits.check(request)
        if request.request_id in self._queues:
            raise BadRequest(f"request id {request.request_id!r} is in use; choose another", param="request_id")
        self._queues.add(request)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step and give its rows their blocks. Follow with `update` (even without rows) or `fail`."""
        self._room.begin_step(self._queues.waiting[: self.config.max_num_seqs])
        step = StepDraft(self.config.max_num_batched_tokens)
        for request, num_behind in sorted(self._running_with_room(), key=_is_far_behind):
            self._continue(request, num_behind, step)
        if not step.preempted:  # a preempted request never comes back in the same step
            self._admit_waiting(step)
        assert step.budget >= 0 and len(self._queues.running) <= self.config.max_num_seqs
        return step.finish(finished=tuple(output.request_id for output in self._unsent))

    def advance(self, output: SchedulerOutput) -> None:
        """Count a step as computed before its tokens are known, so that the next can be scheduled: a row that samples
        gets PENDING_TOKEN_ID, which `update` of the same step replaces. At most one step is ahead."""
        assert self._ahead is None, "a step is ahead already"
        self._ahead = output
        for row in output.rows:
            if row.request.status is RequestStatus.RUNNING:
                row.request.num_computed_tokens += row.num_new_tokens
                if row.samples:
                    row.request.output_token_ids.append(PENDING_TOKEN_ID)

    def update(
        self,
        output: SchedulerOutput,
        sampled: Mapping[str, SampledToken],
        prompt_logprobs: Mapping[str, PromptLogprobs] | None = None,
    ) -> list[RequestOutput]:
        """Take in what a step computed: `sampled` holds a token for every row that samples, `prompt_logprobs` those
        of the requests whose prompt this step completed. Requests that ended since `schedule` are passed over; one
        that was preempted since `advance` takes its token along.

        Should it raise half-way, the outputs made so far go out with `fail`."""
        if self._ahead is not output:
            self.advance(output)
        self._ahead = None
        for row in output.rows:
            request = row.request
            if request.status.is_finished:
                continue
            token = sampled[request.request_id] if row.samples else None
            if token is not None:
                request.output_token_ids[-1] = token.token_id
            if request.status is RequestStatus.RUNNING:
                self.blocks.commit(request)
            if token is not None or request.num_computed_tokens == request.num_tokens:
                found = prompt_logprobs.get(request.request_id) if prompt_logprobs else None
                self._unsent.append(self._report(request, token, found))
        return self._take_unsent()

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request in any state and free what it holds; None when it is unknown or has ended."""
        request = self._queues.get(request_id)
        if request is None:
            return None
        self._end(request, RequestStatus.FINISHED_ABORT)
        return terminal_output(request)

    def fail(self, request_ids: Iterable[str], message: str) -> list[RequestOutput]:
        """End requests with an error. Their blocks leave the prefix cache: what the step wrote is not trusted."""
        outputs = self._take_unsent()
        for request_id in request_ids:
            request = self._queues.get(request_id)
            if request is not None:
                self._end(request, RequestStatus.FINISHED_ERROR)
                outputs.append(terminal_output(request, message))
        if self._ahead is not None and all(row.request.status.is_finished for row in self._ahead.rows):
            self._ahead = None  # nobody waits for its tokens
        return outputs

    def stats(self, step: SchedulerOutput | None = None) -> EngineStats:
        """The queues now, and `step`; what stands on the device only the engine knows."""
        rows = step.rows if step else ()
        return EngineStats(
            num_running=len(self._queues.running),
            num_waiting=len(self._queues.waiting),
            kv_usage=self.blocks.usage,
            num_step_tokens=step.num_tokens if step else 0,
            num_step_rows=len(rows),
            num_step_adapters=len({use.version for row in rows for use in row.request.adapters}),
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            num_preemptions=self._num_preemptions,
            running_versions=_versions(self._queues.running),
            waiting_versions=_versions(self._queues.waiting),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, block tables and adapter room agree on every request."""
        self._queues.check_integrity()
        self.blocks.check_integrity()
        running, waiting = self._queues.running, self._queues.waiting
        assert len(running) <= self.config.max_num_seqs, "more running than max_num_seqs"
        if self._ahead is None:
            assert all(request.num_computed_tokens < request.num_tokens for request in running), "nothing to compute"
            assert not any(map(has_pending_token, [*running, *waiting])), "a token is pending of no step"
        assert not any(request.block_table or request.num_computed_tokens for request in waiting), "waits with blocks"
        assert all(request_id in self._queues for request_id in self.blocks.holders), "an ended request holds blocks"
        assert self._room.bypassed <= {request.request_id for request in waiting}, "an ended wait is still counted"

    def _running_with_room(self) -> list[tuple[Request, int]]:
        """Running requests whose adapters are resident for this step, by arrival, with the tokens each lacks."""
        ready = []
        for request in list(self._queues.running):
            if self._ahead is not None and self._limits.will_end(request):
                continue
            room = self._room.keep(request)
            if room is Room.GRANTED:
                ready.append((request, request.num_tokens - request.num_computed_tokens))
            elif room is Room.NEVER:
                self._refuse(request)
        return ready

    def _continue(self, request: Request, num_behind: int, step: StepDraft) -> None:
        """Schedule what a running request still lacks, as far as the budget and the free blocks go."""
        wanted = min(num_behind, step.budget)
        while wanted and request.status is RequestStatus.RUNNING:
            if self.blocks.allocate_slots(request, wanted):
                step.add(request, wanted)
                return
            # A chunk shrinks to the free blocks; only for want of a single token does another request lose its own.
            num_free_slots = self.blocks.num_free_slots(request)
            if num_free_slots > 0:
                wanted = num_free_slots
            else:
                self._preempt_latest(step)

    def _preempt_latest(self, step: StepDraft) -> None:
        """Take the blocks of the latest arrival, which will compute its tokens again."""
        victim = self._queues.preempt_latest()
        step.preempt(victim)
        self.blocks.free(victim)
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        self._num_preemptions += 1

    def _admit_waiting(self, step: StepDraft) -> None:
        for request in list(self._queues.waiting):
            if step.budget == 0 or len(self._queues.running) == self.config.max_num_seqs:
                return
            room = self._room.admit(request)
            if room is Room.NEVER:
                self._refuse(request)
            elif room is Room.GRANTED and not self._admit(request, step):
                return  # nobody overtakes for want of blocks, so the blocks it needs will come

    def _admit(self, request: Request, step: StepDraft) -> bool:
        """Let a request run when there are blocks for all it has to compute, and one more for each that runs."""
        num_cached_tokens = self.blocks.match_prefix(request)
        num_missing = self.blocks.num_blocks_for(request.num_tokens) - len(request.block_table)
        if num_missing + len(self._queues.running) > self.blocks.num_free:
            self.blocks.free(request)
            return False
        if request.first_scheduled_time is None:
            self._count_first_admission(request, num_cached_tokens)
        request.num_computed_tokens = num_cached_tokens
        self._queues.start(request)
        self._room.forget(request.request_id)
        self._continue(request, request.num_tokens - num_cached_tokens, step)
        return True

    def _count_first_admission(self, request: Request, num_cached_tokens: int) -> None:
        request.first_scheduled_time = self._clock()
        self._room.begin_use(request)
        request.num_cached_tokens = num_cached_tokens
        if self.blocks.may_match(request):
            self._prefix_queries += request.num_tokens
            self._prefix_hits += num_cached_tokens

    def _report(
        self, request: Request, token: SampledToken | None, prompt_logprobs: PromptLogprobs | None
    ) -> RequestOutput:
        """The output of a request that got its next token or had none to get; ends it after the last."""
        status = self._limits.end_status(request)
        if status is not None:
            self._end(request, status)
        return RequestOutput(
            request_id=request.request_id,
            new_token_ids=(token.token_id,) if token else (),
            logprobs=(token.logprob,) if token and token.logprob else None,
            prompt_logprobs=prompt_logprobs,
            finish_reason=status.finish_reason if status else None,
            stop_token_id=request.output_token_ids[-1] if status is RequestStatus.FINISHED_STOP else None,
            num_cached_tokens=request.num_cached_tokens,
            first_scheduled_time=request.first_scheduled_time,
        )

    def _end(self, request: Request, status: RequestStatus) -> None:
        if has_pending_token(request):
            request.output_token_ids.pop()
        self._queues.end(request, status)
        self._room.forget(request.request_id)
        self.blocks.forget(request, keep_cached=status is not RequestStatus.FINISHED_ERROR)

    def _refuse(self, request: Request) -> None:
        """The adapters do not fit even alone; `add` cannot know, since only pinning tells."""
        versions = ", ".join(use.version[:12] for use in request.adapters)
        message = f"adapters {versions} do not fit on the device together; name fewer or restart with a larger"
        self._end(request, RequestStatus.FINISHED_ERROR)
        self._unsent.append(terminal_output(request, f"{message} --lora-memory"))

    def _take_unsent(self) -> list[RequestOutput]:
        unsent, self._unsent = self._unsent, []
        return unsent


def _is_far_behind(candidate: tuple[Request, int]) -> bool:
    """Sorts requests that lack one token before those with more to compute; each side stays by arrival."""
    return candidate[1] > 1


def _versions(requests: Iterable[Request]) -> tuple[str, ...]:
    return tuple(sorted({use.version for request in requests for use in request.adapters}))
