"""Streams over ASGI and over a socket: their shape, their failures, and what happens when the client leaves."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from server.api import sse
from server.engine.request import FinishReason
from tests.api.conftest import LiveServer, World
from tests.api.fakes import BASE, REPLY

HELLO = [{"role": "user", "content": "Hello"}]


def events(text: str) -> list[Any]:
    """The data of each event; [DONE] as the string."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "[DONE]" else json.loads(line) for line in (line[6:] for line in lines)]


async def stream(client: httpx.AsyncClient, path: str, **fields: Any) -> tuple[httpx.Response, list[Any]]:
    prompt: dict[str, Any] = {"messages": HELLO} if "chat" in path else {"prompt": "the fox", "max_tokens": 64}
    response = await client.post(path, json={"model": BASE, "stream": True} | prompt | fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return response, events(response.text)


@pytest.mark.asyncio
async def test_chat_chunks(client: httpx.AsyncClient) -> None:
    response, chunks = await stream(client, "/v1/chat/completions", model="sql")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]
    assert response.headers["x-loramux-adapter-version"] == "a" * 64
    assert "openai-processing-ms" not in response.headers
    assert chunks[-1] == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {chunk["object"] for chunk in chunks[:-1]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == "select * from table where x = 1;"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks[:-1])


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_usage_comes_in_a_last_chunk_without_choices(client: httpx.AsyncClient, path: str) -> None:
    _, chunks = await stream(client, path, stream_options={"include_usage": True}, n=2)
    *body, last, done = chunks
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in body)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 2
    _, without = await stream(client, path, stream_options=None)
    assert all("usage" not in chunk for chunk in without[:-1])


@pytest.mark.asyncio
async def test_stream_and_whole_reply_agree(client: httpx.AsyncClient) -> None:
    asked: dict[str, Any] = {
        "prompt": ["the fox", "日本"], "n": 2, "echo": True, "logprobs": 2, "stop": "lazy", "return_token_ids": True,
    }  # fmt: skip
    whole = (await client.post("/v1/completions", json={"model": BASE, "max_tokens": 64} | asked)).json()["choices"]
    _, chunks = await stream(client, "/v1/completions", **asked)
    merged: list[dict[str, Any]] = [{"text": "", "lists": {}, "ids": []} for _ in whole]
    for chunk in chunks[:-1]:
        choice = chunk["choices"][0]
        into = merged[choice["index"]]
        into["text"] += choice["text"]
        into["ids"] += choice["token_ids"]
        for name, values in (choice["logprobs"] or {}).items():
            into["lists"].setdefault(name, []).extend(values)
        into["reason"] = choice["finish_reason"]
    for expected, got in zip(whole, merged, strict=True):
        assert got["text"] == expected["text"]
        assert got["lists"] == expected["logprobs"]
        assert got["ids"] == expected["token_ids"]
        assert got["reason"] == expected["finish_reason"]


@pytest.mark.asyncio
async def test_a_stop_string_across_chunks_never_shows(client: httpx.AsyncClient, world: World) -> None:
    _, chunks = await stream(client, "/v1/completions", stop=["quick brown fox j"])
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "The "
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert world.engine.streams[0].is_aborted


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("reason", "code"), [(FinishReason.ERROR, "engine_error"), (FinishReason.ABORT, "server_unavailable")]
)
@pytest.mark.parametrize("n", [1, 3])
async def test_a_failure_in_mid_stream_is_an_error_event_and_no_done(
    client: httpx.AsyncClient, world: World, reason: FinishReason, code: str, n: int
) -> None:
    world.engine.end_with = (reason, 3)
    _, chunks = await stream(client, "/v1/completions", n=n)
    assert chunks[-1]["error"]["code"] == code
    assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}
    assert "0x" not in json.dumps(chunks)
    assert len(chunks) > 1
    assert f'loramux:errors_total{{code="{code}",model_name="tiny",status="50' in rendered(world)


@pytest.mark.asyncio
async def test_an_unforeseen_failure_in_mid_stream_tells_nothing(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret path")

    monkeypatch.setattr("server.api.completions._Writer._choice", explode)
    _, chunks = await stream(client, "/v1/completions")
    assert chunks == [chunks[0]]
    assert chunks[0]["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(chunks)
    assert 'loramux:errors_total{code="internal_error",model_name="tiny",status="500"} 1.0' in rendered(world)


def rendered(world: World) -> str:
    return world.context.metrics.render().decode()


class Client:
    """An ASGI client that reads one event, then leaves when told."""

    def __init__(self, body: dict[str, Any], path: str) -> None:
        self.scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("test", 80),
        }  # fmt: skip
        self.body = json.dumps(body).encode()
        self.left = asyncio.Event()
        self.got_event = asyncio.Event()
        self.sent: list[Any] = []
        self.is_body_read = False

    async def receive(self) -> dict[str, Any]:
        if not self.is_body_read:
            self.is_body_read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.got_event.set()


@pytest.mark.asyncio
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_takes_its_requests_with_it(world: World, n: int, streamed: bool) -> None:
    world.engine.gate.clear()
    body = {"model": "sql", "messages": HELLO, "n": n, "stream": streamed}
    client = Client(body, "/v1/chat/completions")
    serving = asyncio.create_task(world.app(client.scope, client.receive, client.send))
    async with asyncio.timeout(5):
        while len(world.engine.streams) < n or (streamed and not client.got_event.is_set()):
            await asyncio.sleep(0.001)
        assert len(world.adapters.open_leases) == 1
        client.left.set()
        await serving
    assert world.adapters.open_leases == []
    assert all(each.is_aborted for each in world.engine.streams)
    rendered = world.context.metrics.render().decode()
    assert f'vllm:request_success_total{{engine="0",finished_reason="abort",model_name="tiny"}} {n}.0' in rendered


@pytest.mark.asyncio
async def test_a_client_that_left_before_the_stream_began(world: World) -> None:
    client = Client({"model": "sql", "prompt": "x", "stream": True}, "/v1/completions")
    client.left.set()
    await world.app(client.scope, client.receive, client.send)
    assert len(world.engine.streams) == 1
    world.check_idle()


@pytest.mark.asyncio
async def test_a_client_that_does_not_read_is_left(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STALL_SECONDS", 0.05)
    client = Client({"model": "sql", "prompt": "x", "stream": True}, "/v1/completions")

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async with asyncio.timeout(5):
        await world.app(client.scope, client.receive, stuck)
    assert world.engine.streams[0].is_aborted
    world.check_idle()


@pytest.mark.asyncio
async def test_a_waiting_stream_is_kept_alive_by_comments(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.02)
    world.engine.gate.clear()
    client = Client({"model": BASE, "prompt": "x", "stream": True}, "/v1/completions")
    serving = asyncio.create_task(world.app(client.scope, client.receive, client.send))
    await asyncio.wait_for(client.got_event.wait(), 5)
    assert client.sent[1]["body"] == b": keep-alive\n\n"
    world.engine.gate.set()
    await serving
    assert client.sent[-2]["body"] == b"data: [DONE]\n\n"
    assert client.sent[-1]["more_body"] is False


def test_a_dropped_connection_aborts_and_releases(live: LiveServer) -> None:
    world = live.world
    live.call(world.engine.gate.clear)
    body = {"model": "sql", "messages": HELLO, "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()  # kept: closing the iterator closes the connection
        assert next(lines).startswith("data: ")
        assert len(world.adapters.open_leases) == 1
    live.wait_until(lambda: not world.adapters.open_leases)
    assert world.engine.streams[0].is_aborted


def test_streams_over_a_socket_arrive_whole(live: LiveServer) -> None:
    body = {"model": BASE, "prompt": "x", "stream": True, "max_tokens": 100}
    response = httpx.post(f"{live.url}/v1/completions", json=body)
    assert "".join(chunk["choices"][0]["text"] for chunk in events(response.text)[:-1]) == REPLY
