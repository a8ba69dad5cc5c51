"""What replies of both routes have in common: the envelope, usage, and logprobs as OpenAI writes them.

Knows nothing of how tokens came to be. Replies are plain dicts: they are built by us and need no validation.
"""

import codecs
import hashlib
import math
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from server.api.adapter_hold import AdapterHold
from server.api.context import ServerContext
from server.api.generation import Generation, Usage
from server.engine.request import TokenLogprob
from server.tokenizer import Tokenizer

ADAPTER_VERSION_HEADER = "x-loramux-adapter-version"
ADAPTERS_HEADER = "x-loramux-adapters"
_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True, slots=True)
class Envelope:
    """The keys that every reply and every chunk of one request repeats."""

    reply_id: str
    kind: str
    model: str
    created: int
    system_fingerprint: str
    adapters: Mapping[str, Any]  # {} but where the request gave weights or a list

    @classmethod
    def new(cls, context: ServerContext, generation: Generation, *, prefix: str, kind: str, model: str) -> "Envelope":
        reply_id = f"{prefix}-{uuid.uuid4().hex}"
        adapters = adapters_body(generation.hold)
        return cls(reply_id, kind, model, int(time.time()), system_fingerprint(context), adapters)

    def wrap(self, choices: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
        return {
            "id": self.reply_id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
            **self.adapters,
            **rest,
        }


def system_fingerprint(context: ServerContext) -> str:
    """Changes when the base model or its limits do; the adapter's version is a header of its own."""
    info = context.engine.info
    facts = f"{info.model_name}/{info.vocab_size}/{info.max_model_len}"
    return f"fp_{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def adapter_headers(hold: AdapterHold) -> dict[str, str]:
    """The version, of one adapter; names, versions and weights where the request gave weights or a list."""
    headers: dict[str, str] = {}
    if len(hold.adapters) == 1:
        headers[ADAPTER_VERSION_HEADER] = hold.adapters[0].version
    if hold.is_composed:
        each = (f"{held.name}={held.version};w={held.weight:.12g}" for held in hold.adapters)
        headers[ADAPTERS_HEADER] = ", ".join(each)
    return headers


def adapters_body(hold: AdapterHold) -> dict[str, Any]:
    """What was made of the weights a request gave: sums of equal versions, nothing of weight 0."""
    if not hold.is_composed:
        return {}
    held = [{"name": each.name, "version": each.version, "weight": each.weight} for each in hold.adapters]
    return {"adapters": held}


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB) if math.isfinite(logprob) else _LOWEST_LOGPROB


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
    """{content: [{token, logprob, bytes, top_logprobs}], refusal}; `bytes` is exact where `token` cannot be."""
    content = [
        {
            **_chat_token(tokenizer, each.token_id, each.logprob),
            "top_logprobs": [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in each.top],
        }
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    token_bytes = tokenizer.token_bytes(token_id)
    return {
        "token": token_bytes.decode(errors="replace"),
        "logprob": _finite(logprob),
        "bytes": list(token_bytes),
    }


class CompletionLogprobs:
    """The four parallel lists of the completions route for one choice; offsets run on from chunk to chunk.

    text_offset[i] is the number of characters complete before token i, so the parts of one character share an offset.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def take(self, tokens: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        """The lists for the next tokens; None where a token has no logprob, the first of a prompt."""
        lists: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, logprob in tokens:
            lists["tokens"].append(self._label(token_id))
            lists["token_logprobs"].append(None if logprob is None else _finite(logprob.logprob))
            lists["top_logprobs"].append(None if logprob is None else self._top(logprob))
            lists["text_offset"].append(self._offset)
            self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))
        return lists

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """Label → logprob of the best tokens and the chosen one; of two tokens with one label the likelier stays."""
        top: dict[str, float] = {}
        for token_id, value in (*logprob.top, (logprob.token_id, logprob.logprob)):
            label = self._label(token_id)
            top[label] = max(_finite(value), top.get(label, _LOWEST_LOGPROB))
        return top

    def _label(self, token_id: int) -> str:
        token_bytes = self._tokenizer.token_bytes(token_id)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)
