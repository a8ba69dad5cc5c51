"""POST /v1/completions: prompts as text or token ids, echo, logprobs, n; whole or streamed.

Knows nothing of scheduling or sampling: it validates, encodes, and writes what server/api/generation.py yields.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.responses import Response

from server.api.admission import start_generation
from server.api.answer import answer
from server.api.auth import Role, role_router
from server.api.context import ServerContext, server_context
from server.api.event import EventTemplate, event
from server.api.generation import (
    ChoiceDelta,
    ChoiceResult,
    Generation,
    GenerationSpec,
    Prompt,
)
from server.api.protocol import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from server.api.replies import CompletionLogprobs, Envelope, usage_body
from server.api.sampling import check_choices, check_token_ids, max_tokens_within, sampling_params
from server.api.vocabulary import Vocabulary
from server.errors import BadRequest

router = role_router(Role.INFERENCE)

INLINE_CHARS = 4096  # longer texts are encoded in a thread, so that they do not hold up the other streams


@router.post("/v1/completions")
async def create_completion(
    body: CompletionRequest, request: Request, context: Annotated[ServerContext, Depends(server_context)]
) -> Response:
    check_choices(body.n, context.config.http.max_n)
    generation = await start_generation(
        context,
        body,
        lambda vocabulary: _prepare(context, body, vocabulary),
        key=body.sticky_key,
        receive=request.receive,
    )
    envelope = Envelope.new(context, generation, prefix="cmpl", kind="text_completion", model=body.model)
    writer = _Writer(body, generation, envelope)
    return await answer(request, generation, writer, is_stream=body.stream, count_error=context.metrics.error)


async def _prepare(context: ServerContext, body: CompletionRequest, vocabulary: Vocabulary) -> GenerationSpec:
    encoded = [await _encode(vocabulary, body, each) for each in body.prompts]
    return GenerationSpec(
        prompts=tuple(_prompt(context, body, vocabulary, token_ids, text) for token_ids, text in encoded),
        n=body.n,
        seed=body.seed,
        stop=tuple(body.stop),
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        ignore_eos=body.ignore_eos,
    )


async def _encode(vocabulary: Vocabulary, body: CompletionRequest, prompt: str | list[int]) -> tuple[list[int], str]:
    """Token ids and the text that `echo` repeats."""
    tokenizer = vocabulary.tokenizer
    if isinstance(prompt, str):
        if len(prompt) <= INLINE_CHARS:
            return tokenizer.encode(prompt, body.add_special_tokens), prompt
        return await asyncio.to_thread(tokenizer.encode, prompt, body.add_special_tokens), prompt
    check_token_ids(prompt, vocabulary.size, param="prompt")
    return prompt, tokenizer.decode(prompt, skip_special_tokens=False) if body.echo else ""


def _prompt(
    context: ServerContext, body: CompletionRequest, vocabulary: Vocabulary, token_ids: list[int], text: str
) -> Prompt:
    if not token_ids:
        raise BadRequest("'prompt' has no tokens; send at least one.", param="prompt")
    check_token_ids(token_ids, vocabulary.size, param="prompt")
    max_tokens = max_tokens_within(
        context.engine.info, len(token_ids), asked=body.max_new_tokens, default=DEFAULT_COMPLETION_TOKENS
    )
    params = sampling_params(
        body,
        vocab_size=vocabulary.size,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    return Prompt(tuple(token_ids), params, text)


class _Writer:
    """Writes one request's choices, whole or as chunks."""

    def __init__(self, body: CompletionRequest, generation: Generation, envelope: Envelope) -> None:
        self._body = body
        self._generation = generation
        self._envelope = envelope
        self._logprobs = [CompletionLogprobs(generation.tokenizer) for _ in generation.choices]
        self._templates: dict[int, EventTemplate] = {}  # choice → its plain chunks
        self._begun = [False] * len(generation.choices)

    def reply(self, results: list[ChoiceResult]) -> dict[str, Any]:
        choices = [
            self._choice(
                ChoiceDelta(
                    index=index,
                    text=result.text,
                    token_ids=tuple(result.token_ids),
                    logprobs=tuple(result.logprobs),
                    prompt_logprobs=result.prompt_logprobs,
                    finish_reason=result.finish_reason,
                )
            )
            for index, result in enumerate(results)
        ]
        return self._envelope.wrap(choices, usage=usage_body(self._generation.usage))

    async def events(self) -> AsyncIterator[bytes]:
        async for delta in self._generation.deltas():
            if delta.text and not delta.finish_reason and self.is_plain(delta.index):
                yield self.plain_event(delta)
                continue
            choice = self._choice(delta)
            if choice["text"] or choice["finish_reason"] or choice["logprobs"] or self._body.return_token_ids:
                yield event(self._chunk(choice))
        if self._body.includes_usage:
            yield event(self._envelope.wrap([], usage=usage_body(self._generation.usage)))

    def is_plain(self, index: int) -> bool:
        return self._begun[index] and self._body.logprobs is None and not self._body.return_token_ids

    def plain_event(self, delta: ChoiceDelta) -> bytes:
        template = self._templates.get(delta.index)
        if template is None:
            template = EventTemplate(lambda text: self._chunk(self._choice(replace(delta, text=text))))
            self._templates[delta.index] = template
        return template.event(delta.text)

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._body.includes_usage else {}
        return self._envelope.wrap([choice], **usage)

    def _choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """The next piece of a choice; with `echo`, the first piece begins with the prompt."""
        is_first, self._begun[delta.index] = not self._begun[delta.index], True
        prompt = self._generation.spec.prompts[delta.index // self._generation.spec.n]
        echoes = is_first and self._body.echo
        ids = {"token_ids": list(delta.token_ids)} if self._body.return_token_ids else {}
        if is_first and self._body.return_token_ids:
            ids["prompt_token_ids"] = list(prompt.token_ids)
        return {
            "index": delta.index,
            "text": prompt.text + delta.text if echoes else delta.text,
            "logprobs": self._logprob_lists(delta, prompt if echoes else None),
            "finish_reason": delta.finish_reason,
            **ids,
        }

    def _logprob_lists(self, delta: ChoiceDelta, echoed: Prompt | None) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        tokens = [(each.token_id, each) for each in delta.logprobs]
        prompt_tokens = [] if echoed is None else list(zip(echoed.token_ids, delta.prompt_logprobs or (), strict=True))
        return self._logprobs[delta.index].take([*prompt_tokens, *tokens]) if prompt_tokens or tokens else None
