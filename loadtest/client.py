"""Sends a workload to an OpenAI-style /v1/completions and notes when every part of every reply arrived.

Knows nothing of what the figures are for. Only loopback addresses are accepted: this is a load generator.
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

from loadtest.workload import Call, Workload

VERSION_HEADER = "x-loramux-adapter-version"

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

    @property
    def ended(self) -> float:
        return self.arrivals[-1]

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


async def send(target: Target, calls: Iterable[Call], in_flight: int) -> list[Reply]:
    """Send `calls` in order, `in_flight` at a time; replies in the order they ended."""
    check_loopback(target.url)
    waiting, replies = iter(list(calls)), list[Reply]()
    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # some servers drop idle connections under us
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=target.headers()) as session:

        async def worker() -> None:
            for call in waiting:  # shared: each call is taken by one worker
                replies.append(await _send_one(session, target, call))

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(worker())
    return replies


async def run(target: Target, workload: Workload) -> list[Reply]:
    """The measured part of a workload."""
    return await send(target, workload.calls(), workload.in_flight)


async def fetch_text(target: Target, path: str) -> str | None:
    """The body of GET `path`, None when the server has no such route."""
    async with aiohttp.ClientSession(headers=target.headers()) as session, session.get(target.url + path) as reply:
        return await reply.text() if reply.status == 200 else None


async def _send_one(session: aiohttp.ClientSession, target: Target, call: Call) -> Reply:
    reply = Reply(call, time.monotonic())
    async with session.post(target.url + "/v1/completions", json=target.make_body(call)) as response:
        if response.status != 200:
            raise LoadTestFailed(f"request {call.index} to {call.model!r}: {response.status} {await response.text()}")
        reply.adapter_version = response.headers.get(VERSION_HEADER)
        async for line in response.content:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                _take_event(reply, json.loads(line[6:]), time.monotonic())
    if reply.completion_tokens != call.max_tokens or not reply.arrivals:
        raise LoadTestFailed(
            f"request {call.index} to {call.model!r} got {reply.completion_tokens} tokens, not the {call.max_tokens} "
            "it asked for; the server must honour ignore_eos and include_usage"
        )
    return reply


def _take_event(reply: Reply, event: Mapping[str, Any], now: float) -> None:
    if error := event.get("error"):
        raise LoadTestFailed(f"request {reply.call.index} to {reply.call.model!r} failed midway: {error}")
    if event.get("choices"):
        reply.arrivals.append(now)
    if usage := event.get("usage"):
        reply.prompt_tokens = usage["prompt_tokens"]
        reply.completion_tokens = usage["completion_tokens"]
