"""What a server says of itself during the churn and after it: counters, rooms, leases, and what is left behind.

Everything is read from /metrics and /v1/adapters. Knows nothing of replies.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp

from loadtest.client import LoadTestFailed
from loadtest.exposition import value

PREEMPTIONS, HITS = "vllm:num_preemptions_total", "vllm:prefix_cache_hits_total"
IN_HOST, ON_DEVICE = "vllm:num_cpu_loaded_lora_adapters", "vllm:num_gpu_loaded_lora_adapters"
_IDLE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
_FOLLOW_SECONDS = 0.25
_REST_SECONDS = 15.0


@dataclass(slots=True)
class Watch:
    """The server's counters over the churn, by difference, and the most adapters it ever held."""

    session: aiohttp.ClientSession
    before: dict[str, float]
    now: dict[str, float] = field(default_factory=dict)
    most_in_host: int = 0
    most_on_device: int = 0

    @classmethod
    async def begin(cls, session: aiohttp.ClientSession) -> "Watch":
        page = await _metrics(session)
        return cls(session, {name: value(page, name) or 0.0 for name in (PREEMPTIONS, HITS)})

    async def follow(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self._look()
            await asyncio.sleep(_FOLLOW_SECONDS)
        await self._look()

    def faults(self, *, host_room: int | None) -> list[str]:
        found = []
        if self._since(PREEMPTIONS):
            # Tokens before a preemption are computed again as a prompt: the one case in which bits may differ.
            found.append(f"{self._since(PREEMPTIONS)} preemptions: give the server more --kv-cache-memory")
        if not self._since(HITS):
            found.append("no prefix was ever found again, so the prefix cache was not on trial")
        if host_room is not None and self.most_in_host > host_room:
            found.append(f"{self.most_in_host} adapters stood in host memory, which has room for {host_room}")
        return found

    def __str__(self) -> str:
        return (
            f"{self._since(PREEMPTIONS)} preemptions, {self._since(HITS)} prefix tokens found again, at most "
            f"{self.most_in_host} adapters in host memory and {self.most_on_device} on the device"
        )

    async def _look(self) -> None:
        page = await _metrics(self.session)
        self.now = {name: value(page, name) or 0.0 for name in (PREEMPTIONS, HITS)}
        self.most_in_host = max(self.most_in_host, int(value(page, IN_HOST) or 0))
        self.most_on_device = max(self.most_on_device, int(value(page, ON_DEVICE) or 0))

    def _since(self, name: str) -> int:
        return int(self.now[name] - self.before[name])


async def faults_at_rest(session: aiohttp.ClientSession) -> list[str]:
    """Leases, rows or blocks that nobody asked for any more; empty once there are none, or what stays."""

    async def look() -> list[str]:
        page = await _metrics(session)
        found = [f"{name} is {value(page, name)} at rest" for name in _IDLE if value(page, name) != 0.0]
        for each in await _adapters(session):
            if each["leases"]:
                found.append(f"{each['name']} has {each['leases']} leases at rest")
            if each["state"] in ("draining", "fetching", "validating", "failed"):
                found.append(f"{each['name']} is {each['state']} at rest")
        return found

    return await _until_none(look)


async def faults_when_cleared(session: aiohttp.ClientSession) -> list[str]:
    """What is still there when every name was taken away."""

    async def look() -> list[str]:
        page = await _metrics(session)
        found = [f"{each['name']} is listed after its delete" for each in await _adapters(session)]
        return found + [
            f"{name} is {value(page, name)} without names" for name in (IN_HOST, ON_DEVICE) if value(page, name)
        ]

    return await _until_none(look)


async def _until_none(look: Callable[[], Awaitable[list[str]]]) -> list[str]:
    deadline = time.monotonic() + _REST_SECONDS
    while (found := await look()) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return list(found)


async def _metrics(session: aiohttp.ClientSession) -> str:
    async with session.get("/metrics") as reply:
        if reply.status != 200:
            raise LoadTestFailed(f"/metrics: {reply.status}")
        return await reply.text()


async def _adapters(session: aiohttp.ClientSession) -> list[dict[str, object]]:
    async with session.get("/v1/adapters") as reply:
        if reply.status != 200:
            raise LoadTestFailed(f"/v1/adapters: {reply.status} {(await reply.text())[:200]}")
        data: list[dict[str, object]] = (await reply.json())["data"]
        return data
