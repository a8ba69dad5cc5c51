"""How long a request may get: what is refused at admission, and when a running one ends. Integers; changes nothing."""

from dataclasses import dataclass

from server.engine.request import Request, RequestStatus
from server.engine.scheduler_output import has_pending_token
from server.errors import BadRequest, ContextLengthExceeded


@dataclass(frozen=True, slots=True)
class RequestLimits:
    max_model_len: int  # tokens of one sequence
    capacity: int  # tokens the whole KV cache holds

    def check(self, request: Request) -> None:
        """BadRequest for an empty prompt, ContextLengthExceeded for a request that could not run even alone."""
        num_prompt, max_tokens = request.num_prompt_tokens, request.sampling_params.max_tokens
        if num_prompt == 0:
            raise BadRequest("the prompt has 0 tokens; send at least 1", param="prompt")
        if num_prompt + min(max_tokens, 1) > self.max_model_len:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens and leaves no room to generate within the model's "
                f"{self.max_model_len}; shorten the prompt or restart with a larger --max-model-len",
                param="prompt",
            )
        # The last token sampled is never computed, so it needs no slot.
        num_slots = max(num_prompt, min(num_prompt + max_tokens, self.max_model_len) - 1)
        if num_slots > self.capacity:
            raise ContextLengthExceeded(
                f"{num_prompt} tokens of prompt and max_tokens={max_tokens} need {num_slots} tokens of KV cache, which "
                f"holds {self.capacity}; lower max_tokens, shorten the prompt or restart with a larger "
                "--kv-cache-memory",
                param="max_tokens",
            )

    def end_status(self, request: Request) -> RequestStatus | None:
        """How the request ends with its last token; None when it goes on."""
        num_output = request.num_output_tokens
        if num_output > request.sampling_params.min_tokens and request.output_token_ids[-1] in request.stop_ids:
            return RequestStatus.FINISHED_STOP
        return RequestStatus.FINISHED_LENGTH if self._is_at_length(request) else None

    def will_end(self, request: Request) -> bool:
        """Whether the step ahead is the request's last, whatever token it brings."""
        if request.num_computed_tokens == request.num_tokens:
            return True
        return has_pending_token(request) and self._is_at_length(request)

    def _is_at_length(self, request: Request) -> bool:
        params = request.sampling_params
        return request.num_output_tokens >= params.max_tokens or request.num_tokens >= self.max_model_len
