"""Turns (prompts × n) into admitted engine requests under one lease: all of them or none.

Knows nothing of JSON or of how replies look; what becomes of the requests is server/api/generation.py's.
"""

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

from starlette.types import Receive

from adapters.adapter_ref import Lease
from server.api.context import RequestStream, ServerContext
from server.api.generation import Choice, Generation, GenerationSpec, Usage
from server.api.leasing import lease_adapter, until_ready
from server.api.sampling import with_seed
from server.engine.request import Request
from server.text_stream import TextStream


async def start_generation(
    context: ServerContext,
    model: str,
    prepare: Callable[[], Awaitable[GenerationSpec]],
    *,
    key: str | None,
    receive: Receive,
) -> Generation:
    """Lease the adapter, prepare (encode, check lengths) under the lease, wait until it is in memory, admit all choices
    or none. `key` keeps an alias's choice the same.

    Raises ModelNotFound, AdapterNotReady, ClientGone, whatever `prepare` raises, QueueFull or Unavailable; then nothing
    is left behind.
    """
    lease = await lease_adapter(context, model, key, receive)
    try:
        spec = await prepare()
        await until_ready(context, lease, receive)
        return _admit(context, lease, spec)
    except BaseException:
        if lease is not None:
            lease.release()
        raise


def _admit(context: ServerContext, lease: Lease | None, spec: GenerationSpec) -> Generation:
    requests = _requests(context, lease, spec)
    streams = context.engine.admit(requests)
    try:
        generation = _generation(context, lease, spec, requests, streams)
        if lease is not None:
            lease.on_revoked = generation.revoke
        return generation
    except BaseException:
        for stream in streams:  # before the lease is given back: the engine must not meet a freed version
            stream.abort()
        raise


def _generation(
    context: ServerContext,
    lease: Lease | None,
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
            lease=lease,
            text=TextStream(
                context.tokenizer,
                request.prompt_token_ids,
                spec.stop,
                spec.include_stop,
                spec.skip_special_tokens,
                request.sampling_params.min_tokens,
            ),
            metrics=context.metrics.request_started(
                adapter=None if lease is None else lease.ref.name,
                num_prompt_tokens=request.num_prompt_tokens,
                arrival_time=request.arrival_time,
            ),
            usage=usage,
        )
        for index, (request, stream) in enumerate(zip(requests, streams, strict=True))
    ]
    return Generation(spec=spec, lease=lease, choices=choices, usage=usage)


def _requests(context: ServerContext, lease: Lease | None, spec: GenerationSpec) -> list[Request]:
    stem = uuid.uuid4().hex
    eos = frozenset() if spec.ignore_eos else context.engine.info.eos_token_ids
    return [
        Request(
            request_id=f"{stem}-{at * spec.n + choice}",
            prompt_token_ids=prompt.token_ids,
            sampling_params=with_seed(prompt.params, spec.seed, choice),
            stop_ids=eos | frozenset(prompt.params.stop_token_ids),
            adapters=() if lease is None else (lease.ref.use,),
            arrival_time=time.monotonic(),
        )
        for at, prompt in enumerate(spec.prompts)
        for choice in range(spec.n)
    ]
