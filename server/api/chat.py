"""POST /v1/chat/completions: messages through the model's own template; whole or streamed.

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
from server.api.protocol import ChatRequest
from server.api.replies import Envelope, chat_logprobs, usage_body
from server.api.sampling import check_choices, check_token_ids, max_tokens_within, sampling_params
from server.api.vocabulary import Vocabulary
from server.errors import BadRequest

router = role_router(Role.INFERENCE)


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, context: Annotated[ServerContext, Depends(server_context)]
) -> Response:
    check_choices(body.n, context.config.http.max_n)
    generation = await start_generation(
        context,
        body,
        lambda vocabulary: _prepare(context, body, vocabulary),
        key=body.sticky_key,
        receive=request.receive,
    )
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    envelope = Envelope.new(context, generation, prefix="chatcmpl", kind=kind, model=body.model)
    writer = _Writer(body, generation, envelope)
    return await answer(request, generation, writer, is_stream=body.stream, count_error=context.metrics.error)


async def _prepare(context: ServerContext, body: ChatRequest, vocabulary: Vocabulary) -> GenerationSpec:
    token_ids = await asyncio.to_thread(
        vocabulary.tokenizer.apply_chat_template,
        [message.for_template() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    if not token_ids:
        raise BadRequest("The chat template made an empty prompt of 'messages'.", param="messages")
    check_token_ids(token_ids, vocabulary.size, param="messages")
    max_tokens = max_tokens_within(context.engine.info, len(token_ids), asked=body.max_new_tokens, default=None)
    params = sampling_params(
        body, vocab_size=vocabulary.size, max_tokens=max_tokens, logprobs=body.num_logprobs, prompt_logprobs=None
    )
    return GenerationSpec(
        prompts=(Prompt(tuple(token_ids), params),),
        n=body.n,
        seed=body.seed,
        stop=tuple(body.stop),
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        ignore_eos=body.ignore_eos,
    )


class _Writer:
    """Writes one request's choices, whole or as chunks."""

    def __init__(self, body: ChatRequest, generation: Generation, envelope: Envelope) -> None:
        self._tokenizer = generation.tokenizer
        self._body = body
        self._generation = generation
        self._envelope = envelope
        self._templates: dict[int, EventTemplate] = {}  # choice → its plain chunks

    def reply(self, results: list[ChoiceResult]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": chat_logprobs(self._tokenizer, result.logprobs) if self._body.logprobs else None,
                "finish_reason": result.finish_reason,
                **self._token_ids(tuple(result.token_ids)),
            }
            for index, result in enumerate(results)
        ]
        return self._envelope.wrap(choices, usage=usage_body(self._generation.usage), **self._prompt_ids())

    async def events(self) -> AsyncIterator[bytes]:
        for choice in self._generation.choices:
            opening = {"index": choice.index, "delta": {"role": "assistant", "content": ""}}
            yield event(self._chunk({**opening, "logprobs": None, "finish_reason": None}))
        async for delta in self._generation.deltas():
            if delta.text or delta.finish_reason or delta.logprobs or self._body.return_token_ids:
                is_plain = delta.text and not delta.finish_reason and self.is_plain(delta.index)
                yield self.plain_event(delta) if is_plain else event(self._chunk(self._chunk_choice(delta)))
        if self._body.includes_usage:
            yield event(self._envelope.wrap([], usage=usage_body(self._generation.usage)))

    def is_plain(self, _: int) -> bool:
        return not (self._body.logprobs or self._body.return_token_ids)

    def plain_event(self, delta: ChoiceDelta) -> bytes:
        template = self._templates.get(delta.index)
        if template is None:
            template = EventTemplate(lambda text: self._chunk(self._chunk_choice(replace(delta, text=text))))
            self._templates[delta.index] = template
        return template.event(delta.text)

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._body.includes_usage else {}
        return self._envelope.wrap([choice], **usage)

    def _chunk_choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        has_logprobs = self._body.logprobs and delta.logprobs
        return {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": chat_logprobs(self._tokenizer, delta.logprobs) if has_logprobs else None,
            "finish_reason": delta.finish_reason,
            **self._token_ids(delta.token_ids),
        }

    def _token_ids(self, token_ids: tuple[int, ...]) -> dict[str, Any]:
        return {"token_ids": list(token_ids)} if self._body.return_token_ids else {}

    def _prompt_ids(self) -> dict[str, Any]:
        if not self._body.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self._generation.spec.prompts[0].token_ids)}
