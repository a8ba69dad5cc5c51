"""Requests for the measurements of adapters' tiers: one at a time, or so many in flight, and loads beside them.

Prompts are random token ids, so that no two share a cached beginning. Knows nothing of what is concluded.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from loadtest.client import LoadTestFailed

PROMPT_TOKENS = 64
_LOWEST_ID, _HIGHEST_ID = 1000, 40000  # plain words of the default model


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds: to the first token, and between each token and the next."""

    first_token: float
    gaps: tuple[float, ...]
    num_tokens: int


class Asker:
    """One connection pool to one server, and an endless row of different prompts."""

    def __init__(self, session: aiohttp.ClientSession, seed: int) -> None:
        self._session = session
        self._random = random.Random(seed)

    async def ask(self, model: str, max_tokens: int, *, prompt_tokens: int = PROMPT_TOKENS) -> Answer:
        """Stream one greedy completion. Raises LoadTestFailed."""
        prompt = [self._random.randrange(_LOWEST_ID, _HIGHEST_ID) for _ in range(prompt_tokens)]
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        sent, arrivals = time.monotonic(), list[float]()
        async with self._session.post("/v1/completions", json={**body, "stream": True}) as reply:
            if reply.status != 200:
                raise LoadTestFailed(f"{model}: {reply.status} {(await reply.text())[:300]}")
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    _refuse_error(model, line)
                    arrivals.append(time.monotonic())
        if not arrivals:
            raise LoadTestFailed(f"{model}: the stream had no token")
        gaps = tuple(later - earlier for earlier, later in itertools.pairwise(arrivals))
        return Answer(arrivals[0] - sent, gaps, max_tokens)

    async def together(self, models: Sequence[str], in_flight: int, max_tokens: int) -> tuple[float, list[Answer]]:
        """All of `models` in order, so many at a time; (output tokens per second, answers)."""
        queue, answers, began = iter(models), list[Answer](), time.monotonic()

        async def worker() -> None:
            for model in queue:
                answers.append(await self.ask(model, max_tokens))

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(worker())
        return sum(answer.num_tokens for answer in answers) / (time.monotonic() - began), answers

    async def load(self, name: str, source: str, *, wait: float = 60.0) -> None:
        """Load or replace, and with `wait` seconds see it done. Raises LoadTestFailed."""
        body = {"name": name, "source": source, "load_inplace": True}
        async with self._session.post(f"/v1/adapters?wait={wait}", json=body) as reply:
            if reply.status not in ((200, 201) if wait else (200, 201, 202)):
                raise LoadTestFailed(f"load of {name}: {reply.status} {(await reply.text())[:300]}")

    async def load_all(self, sources: Iterable[tuple[str, str]]) -> None:
        for name, source in sources:
            await self.load(name, source)

    async def metrics(self) -> str:
        async with self._session.get("/metrics") as reply:
            return await reply.text()


def _refuse_error(model: str, line: bytes) -> None:
    if b'"error"' in line and "error" in (event := json.loads(line[6:])):
        raise LoadTestFailed(f"{model}: {event['error']}")


@asynccontextmanager
async def asker(url: str, seed: int = 0) -> AsyncIterator[Asker]:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        yield Asker(session, seed)


@asynccontextmanager
async def repeating(begin: Callable[[int], Coroutine[Any, Any, object]], rate: float) -> AsyncIterator[None]:
    """Begin one more beside what is done meanwhile, `rate` times a second, whether or not those before are done.

    What still waits at the end of the block is seen done, so read counts inside it. Raises LoadTestFailed when one
    failed.
    """

    def ended(task: asyncio.Task[Any]) -> None:
        waiting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failures.append(error)

    async def for_ever() -> None:
        began = asyncio.get_running_loop().time()
        for number in itertools.count():
            await asyncio.sleep(began + number / rate - asyncio.get_running_loop().time())
            waiting.add(task := asyncio.create_task(begin(number)))
            task.add_done_callback(ended)

    waiting, failures = set[asyncio.Task[Any]](), list[BaseException]()
    ordering = asyncio.create_task(for_ever())
    ordering.add_done_callback(ended)
    try:
        yield
    finally:
        ordering.cancel()
        await asyncio.gather(ordering, *waiting, return_exceptions=True)
    if failures:
        raise LoadTestFailed(f"{len(failures)} of those beside the traffic failed, first {failures[0]}") from failures[
            0
        ]
