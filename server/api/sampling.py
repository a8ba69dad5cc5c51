"""From a validated request to the engine's SamplingParams: the checks that need the loaded model.

Knows nothing of routes or streams. Raises BadRequest naming the field, or ContextLengthExceeded.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import replace

from server.api.context import EngineInfo
from server.api.protocol import GenerationFields
from server.engine.request import SamplingParams
from server.errors import BadRequest, ContextLengthExceeded

_SMALLEST_TOP_P = 1e-6  # top_p 0 keeps the most likely token, as OpenAI's does
_SEED_MASK = 2**63 - 1


def check_choices(n: int, max_n: int) -> None:
    if n > max_n:
        raise BadRequest(f"'n' is {n}; this server's limit is {max_n}.", param="n")


def check_token_ids(token_ids: Sequence[int], vocab_size: int, *, param: str) -> None:
    """Refuse ids past the model's vocabulary: one would index another row's memory, or stop the engine."""
    if token_ids and max(token_ids) >= vocab_size:
        raise BadRequest(
            f"'{param}' holds a token id that is not below {vocab_size}, the vocabulary's size.", param=param
        )


def max_tokens_within(info: EngineInfo, num_prompt_tokens: int, *, asked: int | None, default: int | None) -> int:
    """Output tokens allowed; None for `asked` takes `default`, None for `default` takes all the room there is."""
    room = info.max_model_len - num_prompt_tokens
    if room < 0 or (room == 0 and asked != 0) or (asked is not None and asked > room):
        raise _context_error(info.max_model_len, num_prompt_tokens, asked)
    if asked is not None:
        return asked
    return room if default is None else min(default, room)


def _context_error(limit: int, num_prompt_tokens: int, asked: int | None) -> ContextLengthExceeded:
    wanted = num_prompt_tokens + (asked or 0)
    parts = f"{num_prompt_tokens} in the prompt" + (f", {asked} in max_tokens" if asked else "")
    return ContextLengthExceeded(
        f"This model's maximum context length is {limit} tokens. However, you asked for {wanted} tokens ({parts}). "
        "Shorten the prompt or ask for fewer tokens.",
        param="max_tokens" if num_prompt_tokens < limit else "prompt",
    )


def sampling_params(
    fields: GenerationFields, *, vocab_size: int, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """What the engine is asked for, the seed apart (`with_seed`). `vocab_size` is the request's own."""
    if fields.min_tokens > max_tokens:
        raise BadRequest(
            f"'min_tokens' is {fields.min_tokens}, and at most {max_tokens} tokens may be generated; set 'max_tokens'.",
            param="min_tokens",
        )
    check_token_ids(fields.stop_token_ids, vocab_size, param="stop_token_ids")
    check_token_ids(list(fields.logit_bias), vocab_size, param="logit_bias")
    return SamplingParams(
        temperature=fields.temperature,
        top_p=max(fields.top_p, _SMALLEST_TOP_P),
        top_k=min(fields.top_k, vocab_size) if fields.top_k > 0 else None,
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=dict(fields.logit_bias),
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens,
        ignore_eos=fields.ignore_eos,
        stop_token_ids=tuple(fields.stop_token_ids),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def choice_seed(seed: int | None, choice: int) -> int:
    """Seed of choice `choice` of a prompt, 63 bits: the same for the same `seed`, whatever n or the other prompts."""
    if seed is None:
        return secrets.randbits(63)
    digest = hashlib.sha256(f"{seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & _SEED_MASK


def with_seed(params: SamplingParams, seed: int | None, choice: int) -> SamplingParams:
    return replace(params, seed=choice_seed(seed, choice))
