"""What a server says of itself during the churn and after it: counters, rooms, leases, and what is left behind.

Everything is read from /metrics and /v1/adapters. Knows nothing of replies.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp

from loadtest.churn_adapters import most_that_fit
from loadtest.client import LoadTestFailed
from loadtest.exposition import value

PREEMPTIONS, HITS = "vllm:num_preemptions_total", "vllm:prefix_cache_hits_total"
LEFT_HOST, LEFT_DEVICE, COLD_READS = "evictions from host memory", "evictions from the device", "cold reads"
IN_HOST, ON_DEVICE = "vllm:num_cpu_loaded_lora_adapters", "vllm:num_gpu_loaded_lora_adapters"
_COUNTERS: dict[str, tuple[str, dict[str, str]]] = {
    PREEMPTIONS: (PREEMPTIONS, {}),
    HITS: (HITS, {}),
    LEFT_HOST: ("loramux:adapter_evictions_total", {"tier": "host"}),
    LEFT_DEVICE: ("loramux:adapter_evictions_total", {"tier": "device"}),
    COLD_READS: ("loramux:adapter_cold_loads_total", {"result": "loaded"}),
}
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
        return cls(session, _counters(await _metrics(session)))

    async def follow(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self._look()
            await asyncio.sleep(_FOLLOW_SECONDS)
        await self._look()

    def faults(self, *, device_room: int, host_room: int | None, num_adapters: int) -> list[str]:
        """What makes the run prove nothing, or is more than the rooms hold; those are of so many adapters."""
        return [
            *self._of_traffic(),
            *self._of_device(device_room, num_adapters),
            *self._of_host(host_room, num_adapters),
        ]

    def _of_traffic(self) -> list[str]:
        found = []
        if self._since(PREEMPTIONS):
            # Tokens before a preemption are computed again as a prompt: the one case in which bits may differ.
            found.append(f"{self._since(PREEMPTIONS)} preemptions: give the server more --kv-cache-memory")
        if not self._since(HITS):
            found.append("no prefix was ever found again, so the prefix cache was not on trial")
        return found

    def _of_device(self, room: int, num_adapters: int) -> list[str]:
        found = []
        if self.most_on_device > most_that_fit(room):
            found.append(f"{self.most_on_device} adapters stood on the device, where at most {most_that_fit(room)} fit")
        if room < num_adapters and not self._since(LEFT_DEVICE):
            found.append(f"no {LEFT_DEVICE}, so its pools were not on trial")
        return found

    def _of_host(self, room: int | None, num_adapters: int) -> list[str]:
        """Without a limit nothing need leave host memory, and what a load brought there need not be read again."""
        if room is None:
            return []
        found = []
        if self.most_in_host > room:
            found.append(f"{self.most_in_host} adapters stood in host memory, which has room for {room}")
        if room < num_adapters:
            moved = (LEFT_HOST, COLD_READS)
            found += [f"no {each}, so host memory was not on trial" for each in moved if not self._since(each)]
        return found

    def __str__(self) -> str:
        moved = ", ".join(f"{self._since(each)} {each}" for each in (LEFT_DEVICE, LEFT_HOST, COLD_READS))
        return (
            f"{self._since(PREEMPTIONS)} preemptions, {self._since(HITS)} prefix tokens found again, {moved}, at most "
            f"{self.most_in_host} adapters in host memory and {self.most_on_device} on the device"
        )

    async def _look(self) -> None:
        page = await _metrics(self.session)
        self.now = _counters(page)
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


def _counters(page: str) -> dict[str, float]:
    return {what: value(page, series, **labels) or 0.0 for what, (series, labels) in _COUNTERS.items()}


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
