"""What the scheduler decided for one step, and the step while it is being decided. Decides nothing itself."""

from dataclasses import dataclass, field, replace

from adapters.adapter_ref import AdapterUse
from server.engine.request import Request, RequestOutput, RequestStatus

PENDING_TOKEN_ID = -1
"""Stands at the end of a request's output while the step that samples this token is under way on the device."""


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Tokens [num_computed_tokens, num_computed_tokens + num_new_tokens) of one request, as it stood when scheduled.

    `samples`: the step reaches the end of all its tokens, so one more is sampled; never when max_tokens is 0.
    """

    request: Request
    num_new_tokens: int
    samples: bool = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        is_last = request.num_computed_tokens + self.num_new_tokens == request.num_tokens
        object.__setattr__(self, "samples", is_last and request.sampling_params.max_tokens > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOutput:
    """One step. `rows`: first those with one new token that sample, then the others; in both, equal adapters stand
    side by side. `finished` ended while scheduling; their outputs come with the next `update` or `fail`."""

    rows: tuple[ScheduledRow, ...] = ()
    num_decode_rows: int = 0  # rows [0, num_decode_rows) have one new token and sample
    num_tokens: int = 0
    preempted: tuple[str, ...] = ()  # request ids whose computed tokens were given up; they start again from 0
    finished: tuple[str, ...] = ()  # request ids

    def still_running(self) -> "SchedulerOutput":
        """Without the rows whose requests have ended since."""
        rows = tuple(row for row in self.rows if row.request.status is RequestStatus.RUNNING)
        if len(rows) == len(self.rows):
            return self
        return replace(
            self,
            rows=rows,
            num_decode_rows=sum(
                row.request.status is RequestStatus.RUNNING for row in self.rows[: self.num_decode_rows]
            ),
            num_tokens=sum(row.num_new_tokens for row in rows),
        )


@dataclass(slots=True)
class StepDraft:
    """A SchedulerOutput in the making."""

    max_num_tokens: int
    num_tokens: int = 0
    rows: dict[str, ScheduledRow] = field(default_factory=dict)
    preempted: list[str] = field(default_factory=list)

    @property
    def budget(self) -> int:
        """Tokens left."""
        return self.max_num_tokens - self.num_tokens

    def add(self, request: Request, num_new_tokens: int) -> None:
        self.rows[request.request_id] = ScheduledRow(request, num_new_tokens)
        self.num_tokens += num_new_tokens

    def preempt(self, request: Request) -> None:
        row = self.rows.pop(request.request_id, None)
        if row is not None:
            self.num_tokens -= row.num_new_tokens
        self.preempted.append(request.request_id)

    def finish(self, finished: tuple[str, ...]) -> SchedulerOutput:
        """Put the rows in their order; within a group of equal adapters they stay as they were scheduled."""
        decoding: dict[tuple[AdapterUse, ...], list[ScheduledRow]] = {}
        others: dict[tuple[AdapterUse, ...], list[ScheduledRow]] = {}
        for row in self.rows.values():
            rows_by_adapters = decoding if row.num_new_tokens == 1 and row.samples else others
            rows = rows_by_adapters.get(row.request.adapters)
            if rows is None:
                rows = rows_by_adapters[row.request.adapters] = []
            rows.append(row)
        return SchedulerOutput(
            rows=tuple(row for group in (decoding, others) for rows in group.values() for row in rows),
            num_decode_rows=sum(map(len, decoding.values())),
            num_tokens=self.num_tokens,
            preempted=tuple(self.preempted),
            finished=finished,
        )


def has_pending_token(request: Request) -> bool:
    """Whether the last token of a request is known to the device alone."""
    return bool(request.output_token_ids) and request.output_token_ids[-1] == PENDING_TOKEN_ID


def terminal_output(request: Request, error: str | None = None) -> RequestOutput:
    """The last output of a request that has ended, without a token."""
    return RequestOutput(
        request_id=request.request_id,
        finish_reason=request.status.finish_reason,
        num_cached_tokens=request.num_cached_tokens,
        first_scheduled_time=request.first_scheduled_time,
        error=error,
    )
