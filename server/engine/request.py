"""What a request is to the engine: token ids in, token ids out. Knows nothing of text, HTTP, tensors or files.

Life of a request: WAITING → RUNNING → (PREEMPTED → RUNNING)* → one FINISHED_* status. Progress is a counter:
`num_computed_tokens` chases `num_tokens`; there is no prefill or decode state. Every admitted request ends with
exactly one `RequestOutput` whose `finish_reason` is set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from adapters.adapter_ref import AdapterUse


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words where it has them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(IntEnum):
    """Ordered so that finished means greater than PREEMPTED."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED_STOP = 3
    FINISHED_LENGTH = 4
    FINISHED_ABORT = 5
    FINISHED_ERROR = 6

    @property
    def is_finished(self) -> bool:
        return self > RequestStatus.PREEMPTED

    @property
    def finish_reason(self) -> FinishReason | None:
        return _FINISH_REASONS.get(self)


_FINISH_REASONS = {
    RequestStatus.FINISHED_STOP: FinishReason.STOP,
    RequestStatus.FINISHED_LENGTH: FinishReason.LENGTH,
    RequestStatus.FINISHED_ABORT: FinishReason.ABORT,
    RequestStatus.FINISHED_ERROR: FinishReason.ERROR,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Applied in this order: penalties (repetition, then frequency and presence),
    logit_bias, min_tokens mask, temperature, top_k, top_p, min_p, then one draw per token from `seed`.

    `temperature` 0 is greedy. `top_k` None and `top_p` 1.0 keep everything. `logprobs` is how many alternatives to
    report beside the chosen token (0 = the chosen one only, None = no logprobs); logprobs are of the raw logits.
    `max_tokens` 0 only computes the prompt (for `prompt_logprobs`). `seed` makes the draw of output token i a pure
    function of (seed, i, logits), so a seed gives the same tokens in any batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One sequence being generated. The scheduler owns the mutable part; everybody else reads."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    stop_ids: frozenset[int] = frozenset()  # eos ids (unless ignore_eos) and stop_token_ids
    adapters: tuple[AdapterUse, ...] = ()  # () = base
    num_token_ids: int | None = None  # ids [0, num_token_ids) may be sent and sampled; None = as many as the engine's
    arrival_time: float = 0.0  # seconds, time.monotonic

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0  # tokens whose K and V stand in the cache: [0, num_computed_tokens)
    num_cached_tokens: int = 0  # of those, how many the first admission took from the prefix cache
    block_table: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    first_scheduled_time: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def token_ids(self, begin: int, end: int) -> list[int]:
        """Token ids [begin, end) of prompt and output taken as one sequence."""
        split = len(self.prompt_token_ids)
        prompt = self.prompt_token_ids[begin : min(end, split)]
        return [*prompt, *self.output_token_ids[max(begin - split, 0) : max(end - split, 0)]]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with its log-probability under the raw logits, and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the sampler drew for one row; `logprob` is set when the request asked for logprobs."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What one step brought for one request. `finish_reason` is set on the last output and only there."""

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per new token, when asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # once, before the first token; [0] is None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop id that ended it; it is the last of new_token_ids
    num_cached_tokens: int = 0
    first_scheduled_time: float | None = None  # seconds, time.monotonic
    error: str | None = None  # set when finish_reason is ERROR: what to tell the client


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine after one step; counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # share of blocks held by live requests, 0 to 1
    num_step_tokens: int = 0
    num_step_rows: int = 0
    num_step_adapters: int = 0  # distinct adapter versions in the step's forward pass
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there
    num_preemptions: int = 0
    running_versions: tuple[str, ...] = ()
    waiting_versions: tuple[str, ...] = ()
    active_versions: tuple[str, ...] = ()  # versions with a row range in the device pools
    num_activations: int = 0  # copies of an adapter into the device pools
    num_device_evictions: int = 0  # versions that lost their row range to others
    num_free_lora_rows: int = 0  # rows of the device pools that nobody holds
    num_lora_extra_bytes: int = 0  # of the device, that those versions take beside the pools
