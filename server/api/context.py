"""What the routes work with, made once at start and handed to them as `app.state.context`.

`EngineClient` is the part of `server.async_engine.AsyncEngine` that the HTTP side uses, as a protocol, so that the
routes are tested against a fake that needs no model. Nothing here knows of JSON or of text.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastapi import Request as HTTPRequest

from adapters.adapter_facts import AdapterFacts
from adapters.adapter_ref import AdapterVersion
from server.adapter_tokenizer import AdapterTokenizers
from server.config import ServerConfig
from server.engine.request import EngineStats, Request, RequestOutput
from server.lifecycle.adapter_service import AdapterService
from server.lifecycle.sources.upload_store import UploadStore
from server.metrics import Metrics
from server.tokenizer import Tokenizer


class RequestStream(Protocol):
    """The outputs of one admitted request; the last has `finish_reason` set."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    def abort(self) -> None:
        """End the request now; idempotent, and nothing after the last output."""


class EngineInfo(Protocol):
    """The facts of the loaded model that requests are checked against."""

    @property
    def model_name(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_embeddings(self) -> int: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...


class EngineClient(Protocol):
    """What the routes ask of the engine."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def is_healthy(self) -> bool: ...
    @property
    def facts(self) -> Mapping[AdapterVersion, AdapterFacts]:
        """Of every version in host memory."""

    def admit(self, requests: Sequence[Request]) -> Sequence[RequestStream]:
        """Admit all or none; raise QueueFull, Unavailable or BadRequest."""

    def add_observer(self, observer: Callable[[EngineStats], None]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerContext:
    engine: EngineClient
    tokenizer: Tokenizer
    adapters: AdapterService
    uploads: UploadStore
    metrics: Metrics
    config: ServerConfig
    model_name: str  # the first served name, the one replies carry
    tokenizers: AdapterTokenizers = field(init=False)  # those that adapters bring themselves

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizers", AdapterTokenizers(self.tokenizer))


async def server_context(request: HTTPRequest) -> ServerContext:
    """FastAPI dependency: `context: Annotated[ServerContext, Depends(server_context)]`. A coroutine, as FastAPI runs
    plain functions in another thread.
    """
    context: ServerContext = request.app.state.context
    return context
