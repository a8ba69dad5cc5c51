"""Turns (prompts × n) into admitted engine requests under one hold of adapters: all of them or none.

Knows nothing of JSON or of how replies look; what becomes of the requests is server/api/generation.py's.
"""

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

from starlette.types import Receive

from server.api.adapter_choice import AdapterFields, adapter_choice
from server.api.adapter_hold import AdapterHold
from server.api.context import RequestStream, ServerContext
from server.api.generation import Choice, Generation, GenerationSpec, Usage
from server.api.leasing import hold_adapters, refuse_revoked, until_ready
from server.api.sampling import with_seed
from server.api.vocabulary import Vocabulary, vocabulary_of
from server.engine.request import Request
from server.text_stream import TextStream
from server.tokenizer import Tokenizer


async def start_generation(
    context: ServerContext,
    fields: AdapterFields,
    prepare: Callable[[Vocabulary], Awaitable[GenerationSpec]],
    *,
    key: str | None,
    receive: Receive,
) -> Generation:
    """Lease the adapters, wait until they are in memory, prepare (encode, check lengths) under the leases, admit all
    choices or none. `key` keeps an alias's choice the same.

    Raises ModelNotFound, AdapterNotReady, AdapterConflict, ClientGone, whatever `prepare` raises, QueueFull or
    Unavailable; then nothing is left behind.
    """
    modules = [name for name, _ in context.config.lora_modules]
    choice = adapter_choice(fields, modules=modules, bases=context.adapters.base_names)
    hold = await hold_adapters(context, choice, key, receive)
    try:
        await until_ready(context, hold, receive)
        hold.refuse_conflicts(context.engine.facts)
        vocabulary = await vocabulary_of(context, hold)
        spec = await prepare(vocabulary)
        refuse_revoked(hold)
        return _admit(context, hold, vocabulary, spec)
    except BaseException:
        hold.release()
        raise


def _admit(context: ServerContext, hold: AdapterHold, vocabulary: Vocabulary, spec: GenerationSpec) -> Generation:
    requests = _requests(context, hold, vocabulary, spec)
    streams = context.engine.admit(requests)
    try:
        generation = _generation(context, hold, vocabulary.tokenizer, spec, requests, streams)
        hold.on_revoked(generation.revoke)
        return generation
    except BaseException:
        for stream in streams:  # before the leases are given back: the engine must not meet a freed version
            stream.abort()
        raise


def _generation(
    context: ServerContext,
    hold: AdapterHold,
    tokenizer: Tokenizer,
    spec: GenerationSpec,
    requests: Sequence[Request],
    streams: Sequence[RequestStream],
) -> Generation:
    usage = Usage(prompt_tokens=sum(len(prompt.token_ids) for prompt in spec.prompts))
    choices = [
        Choice(
            index=index,
            is_first_of_prompt=index % spec.n == 0,
            stream=stream,
            hold=hold,
            text=TextStream(
                tokenizer,
                request.prompt_token_ids,
                spec.stop,
                spec.include_stop,
                spec.skip_special_tokens,
                request.sampling_params.min_tokens,
            ),
            metrics=context.metrics.request_started(
                adapter=hold.label,
                num_prompt_tokens=request.num_prompt_tokens,
                arrival_time=request.arrival_time,
            ),
            usage=usage,
        )
        for index, (request, stream) in enumerate(zip(requests, streams, strict=True))
    ]
    return Generation(spec=spec, hold=hold, tokenizer=tokenizer, choices=choices, usage=usage)


def _requests(context: ServerContext, hold: AdapterHold, vocabulary: Vocabulary, spec: GenerationSpec) -> list[Request]:
    stem = uuid.uuid4().hex
    eos = frozenset() if spec.ignore_eos else vocabulary.eos_token_ids
    uses = [hold.uses(context.engine.facts, prompt.token_ids) for prompt in spec.prompts]
    return [
        Request(
            request_id=f"{stem}-{at * spec.n + choice}",
            prompt_token_ids=prompt.token_ids,
            sampling_params=with_seed(prompt.params, spec.seed, choice),
            stop_ids=eos | frozenset(prompt.params.stop_token_ids),
            adapters=uses[at],
            num_token_ids=None if vocabulary.size == context.engine.info.vocab_size else vocabulary.size,
            arrival_time=time.monotonic(),
        )
        for at, prompt in enumerate(spec.prompts)
        for choice in range(spec.n)
    ]
