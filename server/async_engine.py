"""The bridge: an engine in a thread of its own, seen from the event loop as streams and awaitables.

The loop side counts live requests, admits or refuses, and hands outputs to their streams; the thread side drains an
inbox and steps the engine. Nothing is shared but messages. Every admitted request gets exactly one terminal output,
whatever ends it: a stop, an abort, a failed step, the thread's death or shutdown.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters.adapter_facts import AdapterFacts, check_device_room, facts_of
from adapters.adapter_ref import AdapterVersion
from adapters.base_weights import BaseWeights
from adapters.lora_model import LoRAModel
from adapters.module_names import BaseModules
from server.config import SchedulerConfig
from server.engine.engine import Engine, EngineMemory, StepResult
from server.engine.request import EngineStats, FinishReason, Request, RequestOutput
from server.errors import BadRequest, QueueFull, Unavailable
from server.messages import (
    AbortRequest,
    AddRequest,
    CheckIntegrity,
    LoadAdapter,
    Message,
    Shutdown,
    UnloadAdapter,
)
from server.request_stream import RequestStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the front door must know of the engine. Never changes after start."""

    model_name: str
    model_type: str
    max_model_len: int  # tokens
    vocab_size: int  # token ids [0, vocab_size) may be sent and sampled
    num_embeddings: int  # rows of the model's vocabulary; those past vocab_size are padding to the base's tokenizer
    dtype: torch.dtype
    device: str
    eos_token_ids: frozenset[int]
    base: BaseModules
    block_size: int
    memory: EngineMemory
    weights: BaseWeights  # the base's, to be read from any thread
    folder: Path  # the base's


class AsyncEngine:
    """Construct on the event loop that will use it, with a ready engine; `start` runs the thread."""

    def __init__(self, engine: Engine, limits: SchedulerConfig) -> None:
        base = engine.base
        self.info = EngineInfo(
            model_name=base.name,
            model_type=str(base.config.model_type),
            max_model_len=engine.max_model_len,
            vocab_size=engine.num_token_ids,
            num_embeddings=base.vocab_size,
            dtype=base.dtype,
            device=str(base.device),
            eos_token_ids=base.eos_token_ids,
            base=base.modules,
            block_size=engine.blocks.block_size,
            memory=engine.memory,
            weights=base.weights,
            folder=base.folder,
        )
        self.stats = EngineStats()
        self.facts: dict[AdapterVersion, AdapterFacts] = {}  # of the versions in host memory, or on their way there
        self._sizes, self._room = engine.adapters.layers.sizes, engine.adapters.pool.room
        self._max_live = limits.max_num_seqs + limits.max_waiting
        self._streams: dict[str, RequestStream] = {}
        self._observers: list[Callable[[EngineStats], None]] = []
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._messages: deque[Message] = deque()  # taken from the inbox, not yet handled; the thread's while it lives
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_draining = False
        self._has_stopped = False
        self._thread = threading.Thread(target=self._run, args=(engine,), name="engine", daemon=True)

    # The event loop's side.

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        return self._is_running and not self._is_draining

    @property
    def _is_running(self) -> bool:
        return self._thread.is_alive() and not self._has_stopped

    @property
    def num_live(self) -> int:
        """Requests admitted and not yet ended."""
        return len(self._streams)

    def add_observer(self, observe: Callable[[EngineStats], None]) -> None:
        """`observe` is called on the loop after every step."""
        self._observers.append(observe)

    def admit(self, requests: Sequence[Request]) -> list[RequestStream]:
        """Admit all of `requests` or none: QueueFull when the queue is full, Unavailable when not serving, BadRequest
        when they would never find room, AdapterCapacity when their adapters would not on the device.
        """
        if not self.is_healthy:
            raise Unavailable("the server is shutting down" if self._is_draining else "the engine is not running")
        if len(requests) > self._max_live:
            raise BadRequest(
                f"This request asks for {len(requests)} outputs (prompts times n); this server holds at most "
                f"{self._max_live} (--max-num-seqs and --max-waiting together). Send fewer at a time."
            )
        if len(self._streams) + len(requests) > self._max_live:
            raise QueueFull(
                f"{len(self._streams)} requests are in flight and {len(requests)} more would pass the limit of "
                f"{self._max_live}; retry later or raise --max-waiting"
            )
        for request in requests:
            check_device_room(request.adapters, self.facts, self._room)
        streams = [RequestStream(request, self._abort) for request in requests]
        self._streams.update((stream.request.request_id, stream) for stream in streams)
        for request in requests:
            self._inbox.put(AddRequest(request))
        return streams

    # These three take their place in the inbox when called, not when awaited, so that calls keep their order.

    def load_adapter(self, model: LoRAModel) -> Awaitable[None]:
        """Take a checked adapter into the engine; raises AdapterCapacity when host memory is full, and Unavailable at
        once when draining: nobody would use it any more.
        """
        if self._is_draining:
            raise Unavailable("the server is shutting down")
        loading = self._ask(lambda done: LoadAdapter(model, done))
        self.facts[model.version] = facts_of(model, self._sizes.need_of(model))
        return loading

    def unload_adapter(self, version: AdapterVersion) -> Awaitable[None]:
        """Free a version that no request uses any more, in host and device memory. Also what failed to load."""
        self.facts.pop(version, None)
        return self._ask(lambda done: UnloadAdapter(version, done))

    def check_integrity(self) -> Awaitable[None]:
        """Let the engine check its books between two steps; AssertionError says what is wrong."""
        return self._ask(CheckIntegrity)

    async def drain(self, timeout: float) -> bool:
        """Admit nothing more, let live requests finish for `timeout` seconds, then stop. True when all finished."""
        self._is_draining = True
        deadline = time.monotonic() + timeout
        while self._streams and time.monotonic() < deadline and self._is_running:
            await asyncio.sleep(0.02)
        finished = not self._streams
        self._has_stopped = True  # whoever asks from here on is refused at once, not left behind the last message
        self._inbox.put(Shutdown())
        await asyncio.to_thread(self._thread.join)
        self._end_all("the server shut down before the request finished", FinishReason.ABORT)
        return finished

    def _abort(self, request_id: str) -> None:
        self._inbox.put(AbortRequest(request_id))

    def _ask(self, make: "Callable[[Future[None]], Message]") -> Awaitable[None]:
        if not self._is_running:
            raise Unavailable("the engine is not running")
        done: Future[None] = Future()
        self._inbox.put(make(done))
        return asyncio.wrap_future(done)

    def _deliver(self, result: StepResult) -> None:
        for output in result.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                del self._streams[output.request_id]
            stream.put(output)
        self.stats = result.stats
        for observe in self._observers:
            observe(result.stats)

    def _on_death(self) -> None:
        self._has_stopped = True
        self._refuse_waiting()
        self._end_all("the engine died", FinishReason.ERROR)

    def _refuse_waiting(self) -> None:
        """Nobody waits for ever on a message that the thread did not come to."""
        self._take_messages(wait=False)
        while self._messages:
            message = self._messages.popleft()
            if isinstance(message, LoadAdapter | UnloadAdapter | CheckIntegrity):
                _resolve(message.done, _unavailable)

    def _end_all(self, message: str, reason: FinishReason) -> None:
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            stream.put(RequestOutput(request_id=request_id, finish_reason=reason, error=message))

    # The engine thread's side.

    def _run(self, engine: Engine) -> None:
        try:
            self._serve(engine)
        except BaseException:
            logger.critical("the engine thread died", exc_info=True)
            self._call_loop(self._on_death)

    def _serve(self, engine: Engine) -> None:
        while True:
            outputs: list[RequestOutput] = []
            self._take_messages(wait=not engine.has_work)
            while self._messages:
                message = self._messages.popleft()
                if isinstance(message, Shutdown):
                    return
                outputs.extend(_handle(engine, message))
            result = engine.step() if engine.has_work else StepResult(outputs=(), stats=engine.stats())
            merged = StepResult(outputs=(*outputs, *result.outputs), stats=result.stats)
            self._call_loop(lambda merged=merged: self._deliver(merged))  # type: ignore[misc]

    def _take_messages(self, *, wait: bool) -> None:
        """Move what is in the inbox to `_messages`, where it stays until it is handled, even if the thread dies."""
        if wait:
            self._messages.append(self._inbox.get())
        with suppress(queue.Empty):
            while True:
                self._messages.append(self._inbox.get_nowait())

    def _call_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)


def _handle(engine: Engine, message: Message) -> list[RequestOutput]:
    """Apply one message; the outputs are those of requests it ended."""
    match message:
        case AddRequest(request):
            return _add(engine, request)
        case AbortRequest(request_id):
            output = engine.abort(request_id)
            return [] if output is None else [output]
        case LoadAdapter(model, done):
            _resolve(done, lambda: engine.load_adapter(model))
        case UnloadAdapter(version, done):
            _resolve(done, lambda: engine.unload_adapter(version))
        case CheckIntegrity(done):
            _resolve(done, engine.check_integrity)
    return []


def _add(engine: Engine, request: Request) -> list[RequestOutput]:
    try:
        engine.add_request(request)
    except Exception as error:
        logger.exception("request %s could not be added", request.request_id)
        return [RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR, error=str(error))]
    return []


def _resolve(done: "Future[None]", act: Callable[[], None]) -> None:
    """Act, and tell whoever asked; one who no longer waits is not told, but it is done."""
    is_awaited = done.set_running_or_notify_cancel()
    try:
        act()
    except BaseException as error:
        if is_awaited:
            done.set_exception(error)
        else:
            logger.warning("a message nobody waits for failed", exc_info=True)
        if not isinstance(error, Exception):
            raise  # the thread is told to end; whoever asked knows as well
    else:
        if is_awaited:
            done.set_result(None)


def _unavailable() -> None:
    raise Unavailable("the engine is not running")
