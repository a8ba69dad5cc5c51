"""A server that speaks /v1/completions and /metrics and does what its settings say, badly where a test wants it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

STEP_SECONDS = 0.004


@dataclass
class FakeServer:
    """Steps all running requests together, as the real one does, and counts what each step held."""

    serial: bool = False  # one request at a time: adapters never meet
    one_version: bool = False  # every adapter is answered by the same weights
    short: bool = False  # ends before max_tokens
    with_metrics: bool = True
    text: str = "x"  # of every token
    groups_alike: bool = False  # a step holds requests of one adapter only, however many wait
    refuse_every: int | None = None  # every so many requests get 429
    adapters: tuple[str, ...] = ()  # listed after the base
    running: dict[int, str] = field(default_factory=dict)
    steps: int = 0
    step_adapters: int = 0
    step_rows: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)  # the connection of each request

    def __post_init__(self) -> None:
        self._turn = asyncio.Semaphore(1 if self.serial else 1000)
        self._stepped = asyncio.Condition()

    async def step_forever(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            if self.running:
                self.steps += 1
                self.step_rows += len(self.running)
                adapters = len(set(self.running.values()) - {"base"})
                self.step_adapters += min(adapters, 1) if self.groups_alike else adapters
            async with self._stepped:
                self._stepped.notify_all()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.peers.append(str(request.transport and request.transport.get_extra_info("peername")))
        if body["model"] == "missing":
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if self.refuse_every is not None and len(self.bodies) % self.refuse_every == 0:
            return web.json_response({"error": {"message": "the queue is full"}}, status=429)
        response = web.StreamResponse()
        if body["model"] != "base":
            response.headers["x-loramux-adapter-version"] = "v" if self.one_version else f"v-{body['model']}"
        await response.prepare(request)
        async with self._turn:
            await self._stream(response, body)
        return response

    async def _stream(self, response: web.StreamResponse, body: dict[str, Any]) -> None:
        count = body["max_tokens"] - self.short
        self.running[id(response)] = body["model"]
        for _ in range(count):
            async with self._stepped:
                await self._stepped.wait()
            await _event(response, {"choices": [{"text": self.text}]})
        del self.running[id(response)]
        prompt_tokens = 1 + len(body["prompt"].split())
        await _event(response, {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": count}})
        await response.write(b"data: [DONE]\n\n")

    async def metrics(self, _: web.Request) -> web.Response:
        if not self.with_metrics:
            return web.Response(status=404)
        lines = [
            f'loramux:step_adapters_sum{{model_name="m"}} {float(self.step_adapters)}',
            f'loramux:step_adapters_count{{model_name="m"}} {float(self.steps)}',
            f'loramux:step_rows_sum{{model_name="m"}} {float(self.step_rows)}',
            f'loramux:adapter_loads_total{{model_name="m",result="loaded"}} {float(len(self.bodies))}',
        ]
        return web.Response(text="\n".join(lines))

    async def models(self, _: web.Request) -> web.Response:
        cards = [{"id": "base", "parent": None}, *({"id": name, "parent": "base"} for name in self.adapters)]
        return web.json_response({"object": "list", "data": cards})

    @asynccontextmanager
    async def url(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/v1/models", self.models)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        stepping = asyncio.create_task(self.step_forever())
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()  # waits for replies still streaming, so steps must go on meanwhile
            stepping.cancel()


async def _event(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())
