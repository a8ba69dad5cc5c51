"""An engine and an adapter service without model or files, behaving as their contracts say."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from adapters.adapter_facts import AdapterFacts
from adapters.adapter_ref import AdapterRef, AdapterVersion, Lease
from server.engine.request import EngineStats, FinishReason, Request, RequestOutput, TokenLogprob
from server.errors import ModelNotFound, ServerError
from server.tokenizer import Tokenizer

BASE = "tiny"
REPLY = "The quick brown fox jumps over the lazy dog."


@dataclass(frozen=True, kw_only=True)
class FakeInfo:
    model_name: str = BASE
    model_type: str = "llama"
    max_model_len: int = 256
    vocab_size: int = 401
    num_embeddings: int = 448
    eos_token_ids: frozenset[int] = frozenset({1})
    device: str = "cpu"
    dtype: str = "float32"
    block_size: int = 16


class FakeAsyncEngine:
    """Answers every request with the tokens of a text, one a step, then end of sequence.

    `texts` maps an adapter version (None = base) to its text, so that a reply shows whose weights it came from.
    `refuse` is raised by the next admissions. A cleared `gate` holds every stream back before its next output.
    `end_with` (reason, after n tokens) ends requests as the engine would when a step fails or the server stops.
    """

    def __init__(self, tokenizer: Tokenizer, info: FakeInfo | None = None) -> None:
        self.tokenizer = tokenizer
        self.info = info or FakeInfo()
        self.stats = EngineStats()
        self.facts: dict[AdapterVersion, AdapterFacts] = defaultdict(AdapterFacts)
        self.is_healthy = True
        self.texts: dict[str | None, str] = {None: REPLY}
        self.refuse: ServerError | None = None
        self.end_with: tuple[FinishReason, int] | None = None
        self.num_cached_tokens = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.streams: list[FakeStream] = []

    @property
    def requests(self) -> list[Request]:
        return [stream.request for stream in self.streams]

    def admit(self, requests: Sequence[Request]) -> "list[FakeStream]":
        if self.refuse is not None:
            raise self.refuse
        streams = [FakeStream(self, request) for request in requests]
        self.streams.extend(streams)
        return streams

    def add_observer(self, observer: Callable[[EngineStats], None]) -> None:
        observer(self.stats)

    def token_ids(self, request: Request) -> list[int]:
        version = request.adapters[0].version if request.adapters else None
        return self.tokenizer.encode(self.texts[version])

    def check_idle(self) -> None:
        """Every admitted request has ended or was aborted."""
        for stream in self.streams:
            assert stream.is_ended or stream.is_aborted, f"request {stream.request.request_id} still runs"


class FakeStream:
    def __init__(self, engine: FakeAsyncEngine, request: Request) -> None:
        self.request = request
        self.is_aborted = False
        self.is_ended = False
        self.num_sent = 0
        self._engine = engine
        self._pending = self._plan()

    def _plan(self) -> list[int]:
        tokens = self._engine.token_ids(self.request)
        params = self.request.sampling_params
        tokens = [*tokens, 1] if 1 in self.request.stop_ids else tokens * (1 + params.max_tokens // len(tokens))
        return tokens[: params.max_tokens]

    def abort(self) -> None:
        if not self.is_ended:
            self.is_aborted = True

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.is_ended:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        await self._engine.gate.wait()
        output = self._next()
        self.is_ended = output.finish_reason is not None
        return output

    def _next(self) -> RequestOutput:
        early = self._engine.end_with
        if self.is_aborted:
            return self._output((), FinishReason.ABORT)
        if early is not None and self.num_sent >= early[1]:
            return self._output((), early[0])
        if not self._pending:
            return self._output((), FinishReason.LENGTH)
        token = self._pending.pop(0)
        if token in self.request.stop_ids:
            return self._output((token,), FinishReason.STOP, stop_token_id=token)
        return self._output((token,), None if self._pending else FinishReason.LENGTH)

    def _output(
        self, token_ids: tuple[int, ...], reason: FinishReason | None, stop_token_id: int | None = None
    ) -> RequestOutput:
        params = self.request.sampling_params
        is_first = self.num_sent == 0
        self.num_sent += len(token_ids)
        logprobs = None if params.logprobs is None else tuple(self.logprob(each, params.logprobs) for each in token_ids)
        prompt = None
        if is_first and params.prompt_logprobs is not None:
            known = self.request.prompt_token_ids[1:]
            prompt = (None, *(self.logprob(each, params.prompt_logprobs) for each in known))
        return RequestOutput(
            request_id=self.request.request_id,
            new_token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            num_cached_tokens=self._engine.num_cached_tokens,
            error="secret: tensor at 0xdeadbeef" if reason is FinishReason.ERROR else None,
        )

    def logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        """Even ids are the likeliest token; for odd ids the one below is."""
        best = token_id - token_id % 2
        top = [(best, -0.25), *(((best + 2 + at) % 400, -2.0 - at) for at in range(20))]
        return TokenLogprob(token_id, -0.25 if token_id == best else -1.5, tuple(top[:num_top]))


@dataclass
class FakeAdapters:
    """Names to references, all of them in memory; counts open leases."""

    refs: Mapping[str, AdapterRef]
    open_leases: list[Lease] = field(default_factory=list)
    num_acquired: int = 0
    base_names = (BASE,)
    keys: list[str | None] = field(default_factory=list)  # what each request asked an alias's choice to go by

    async def resolve(self, model: str, key: str | None = None) -> Lease | None:
        return self.acquire(model, key)

    def acquire(self, model: str, key: str | None = None) -> Lease | None:
        self.keys.append(key)
        name = model.removeprefix(f"{BASE}:")
        if model == BASE:
            return None
        if name not in self.refs:
            raise ModelNotFound(f"The model '{model}' does not exist.", param="model")
        lease = Lease(self.refs[name], self.open_leases.remove)
        self.open_leases.append(lease)
        self.num_acquired += 1
        return lease

    def expects(self, model: str) -> bool:
        return model.removeprefix(f"{BASE}:") in self.refs

    def is_ready(self, lease: Lease) -> bool:
        return True

    async def ready_all(self, leases: Sequence[Lease]) -> None:
        assert all(lease in self.open_leases for lease in leases)


def adapter_ref(name: str, digit: str) -> AdapterRef:
    version = AdapterVersion(digit * 64)
    return AdapterRef(name=name, version=version, source="", lora_rank=8, num_bytes=1024, modules=("q_proj",))
