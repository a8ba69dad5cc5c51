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
    running: dict[int, str] = field(default_factory=dict)
    steps: int = 0
    step_adapters: int = 0
    step_rows: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._turn = asyncio.Semaphore(1 if self.serial else 1000)
        self._stepped = asyncio.Condition()

    async def step_forever(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            if self.running:
                self.steps += 1
                self.step_rows += len(self.running)
                self.step_adapters += len(set(self.running.values()) - {"base"})
            async with self._stepped:
                self._stepped.notify_all()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if body["model"] == "missing":
            return web.json_response({"error": {"message": "no such model"}}, status=404)
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
            await _event(response, {"choices": [{"text": "x"}]})
        del self.running[id(response)]
        await _event(response, {"choices": [], "usage": {"prompt_tokens": 1 + len(body["prompt"].split()), "completion_tokens": count}})
        await response.write(b"data: [DONE]\n\n")

    async def metrics(self, _: web.Request) -> web.Response:
        if not self.with_metrics:
            return web.Response(status=404)
        lines = [
            f'loramux:step_adapters_sum{{model_name="m"}} {float(self.step_adapters)}',
            f'loramux:step_adapters_count{{model_name="m"}} {float(self.steps)}',
            f'loramux:step_rows_sum{{model_name="m"}} {float(self.step_rows)}',
        ]
        return web.Response(text="\n".join(lines))

    @asynccontextmanager
    async def url(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_get("/metrics", self.metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        stepping = asyncio.create_task(self.step_forever())
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            stepping.cancel()
            await runner.cleanup()


async def _event(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())
