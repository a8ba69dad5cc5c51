"""Sends a workload to an OpenAI-style /v1/completions and notes when every part of every reply arrived.

It shares the machine with the server it measures, so bodies are written before the clock starts, connections are kept
and most events are never parsed. Knows nothing of what the figures are for. Only loopback addresses are accepted: this
is a load generator.
"""

import asyncio
import ipaddress
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from loadtest.sse import EventLines, is_plain_token
from loadtest.workload import Call, Workload

VERSION_HEADER = "x-loramux-adapter-version"

_REPLY_SECONDS = 1800  # a timer for the whole reply: one for each read would cost as much as parsing it
_IDLE_SECONDS = 1.0  # a connection idle for longer is not used again: the server may be closing it

MakeBody = Callable[[Call], dict[str, Any]]


class LoadTestFailed(Exception):
    """The server did not do what was asked of it; the message says which request and what came back."""


@dataclass(slots=True)
class Reply:
    """One request's times, in seconds of the monotonic clock."""

    call: Call
    sent: float
    adapter_version: str | None = None
    arrivals: list[float] = field(default_factory=list)  # of each chunk that carried a choice
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scheduled: float | None = None  # when it should have been sent; None in a closed loop
    error: str | None = None  # why it has no (whole) answer

    @property
    def ended(self) -> float:
        return self.arrivals[-1]

    @property
    def end_to_end(self) -> float:
        return self.ended - self.sent

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds a token after the first; None when there was only one."""
        later_tokens = self.completion_tokens - 1
        return (self.ended - self.arrivals[0]) / later_tokens if later_tokens > 0 else None

    @property
    def time_to_first_token(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def inter_token_latencies(self) -> list[float]:
        """Between one chunk and the next; a token whose text is held back arrives with a later one."""
        return [later - earlier for earlier, later in itertools.pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how it is told which model a request wants."""

    url: str
    make_body: MakeBody
    api_key: str | None = None
    keep_alive: bool = True  # False: a connection for each request

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def by_model(call: Call) -> dict[str, Any]:
    """The body any OpenAI-style server takes: greedy, exactly max_tokens long, streamed, with usage."""
    return {
        "model": call.model,
        "prompt": call.prompt,
        "max_tokens": call.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def by_lora_field(num_adapters: int) -> MakeBody:
    """llama.cpp's way: every registered adapter by number, all but one at scale 0."""

    def make_body(call: Call) -> dict[str, Any]:
        scales = [{"id": i, "scale": float(i == call.model_index)} for i in range(num_adapters)]
        return {**by_model(call), "lora": scales}

    return make_body


def check_loopback(url: str) -> None:
    """Raises ValueError for an address that is not this machine's own."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ValueError(f"{url} is not an address of this machine; run the load test beside the server")


async def send(target: Target, calls: Iterable[Call], in_flight: int, *, max_errors: int = 0) -> list[Reply]:
    """Send `calls` in order, `in_flight` at a time; replies in the order they ended, failed ones with their error.

    Raises an ExceptionGroup of the failure that is one too many.
    """
    async with _Sender(target, max_errors) as sender:
        waiting = iter(sender.prepare(calls))

        async def worker() -> None:
            for call, body in waiting:  # shared: each call is taken by one worker
                await sender.send(call, body)

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(worker())
    return sender.replies


async def send_on_time(target: Target, calls: Iterable[Call], *, max_errors: int = 0) -> list[Reply]:
    """Send each of `calls` at its `send_at`, whatever became of those before; replies and errors as `send`."""
    async with _Sender(target, max_errors) as sender:
        waiting = sender.prepare(calls)
        async with asyncio.TaskGroup() as group:
            start = time.monotonic()
            for call, body in waiting:
                moment = start + (call.send_at or 0.0)
                await asyncio.sleep(max(0.0, moment - time.monotonic()))
                group.create_task(sender.send(call, body, scheduled=moment))
    return sender.replies


async def run(target: Target, workload: Workload, *, max_errors: int = 0) -> list[Reply]:
    """The measured part of a workload."""
    if workload.is_open:
        return await send_on_time(target, workload.calls(), max_errors=max_errors)
    return await send(target, workload.calls(), workload.in_flight, max_errors=max_errors)


async def fetch_text(target: Target, path: str) -> str | None:
    """The body of GET `path`, None when the server has no such route."""
    check_loopback(target.url)
    async with aiohttp.ClientSession(headers=target.headers()) as session, session.get(target.url + path) as reply:
        return await reply.text() if reply.status == 200 else None


class _Sender:
    """A pool of connections to one server and the replies so far."""

    def __init__(self, target: Target, max_errors: int) -> None:
        check_loopback(target.url)
        self._target, self._errors_left = target, max_errors
        self.replies: list[Reply] = []

    async def __aenter__(self) -> "_Sender":
        keep: dict[str, Any] = (
            {"keepalive_timeout": _IDLE_SECONDS} if self._target.keep_alive else {"force_close": True}
        )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, **keep),
            timeout=aiohttp.ClientTimeout(total=_REPLY_SECONDS),
            headers={"Content-Type": "application/json", **self._target.headers()},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def prepare(self, calls: Iterable[Call]) -> list[tuple[Call, bytes]]:
        """Every call with its body, written before anything is timed."""
        return [(call, json.dumps(self._target.make_body(call)).encode()) for call in calls]

    async def send(self, call: Call, body: bytes, *, scheduled: float | None = None) -> None:
        reply = Reply(call, time.monotonic(), scheduled=scheduled)
        try:
            await self._stream(reply, body)
        except (LoadTestFailed, aiohttp.ClientError, TimeoutError) as error:
            if self._errors_left == 0:
                raise _said_of(call, error) from error
            self._errors_left -= 1
            reply.error = str(_said_of(call, error))
        self.replies.append(reply)

    async def _stream(self, reply: Reply, body: bytes) -> None:
        call = reply.call
        async with self._session.post(self._target.url + "/v1/completions", data=body) as response:
            if response.status != 200:
                raise LoadTestFailed(f"{_name(call)}: {response.status} {await response.text()}")
            reply.adapter_version = response.headers.get(VERSION_HEADER)
            lines = EventLines()
            async for chunk in response.content.iter_any():
                now = time.monotonic()
                for payload in lines.feed(chunk):
                    _take_event(reply, payload, now)
        if reply.completion_tokens != call.max_tokens or not reply.arrivals:
            raise LoadTestFailed(
                f"{_name(call)} got {reply.completion_tokens} tokens, not the {call.max_tokens} it asked for; "
                "the server must honour ignore_eos and include_usage"
            )


def _take_event(reply: Reply, payload: bytes, now: float) -> None:
    if is_plain_token(payload):
        reply.arrivals.append(now)
        return
    event: Mapping[str, Any] = json.loads(payload)
    if error := event.get("error"):
        raise LoadTestFailed(f"{_name(reply.call)} failed midway: {error}")
    if event.get("choices"):
        reply.arrivals.append(now)
    if usage := event.get("usage"):
        reply.prompt_tokens = usage["prompt_tokens"]
        reply.completion_tokens = usage["completion_tokens"]


def _name(call: Call) -> str:
    return f"request {call.index} to {call.model!r}"


def _said_of(call: Call, error: Exception) -> Exception:
    """The error as it is when it says enough, else with the request it happened to."""
    if isinstance(error, LoadTestFailed | OSError) and str(error):
        return error
    return LoadTestFailed(f"{_name(call)}: {type(error).__name__} {error}".rstrip())
