"""Whatever goes wrong, the reply has OpenAI's four keys, the right status, and nothing of what the client sent."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.api.auth import Role, role_router
from tests.api.conftest import LiveServer, World
from tests.api.fakes import BASE

COMPLETIONS = "/v1/completions"
JSON = {"content-type": "application/json"}


def check(response: httpx.Response, status: int, code: str | None = None, param: str | None = None) -> str:
    """The message, once the shape is right."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)
    assert (error["code"], error["param"]) == (code, param)
    assert response.headers["x-request-id"]
    assert int(response.headers["openai-processing-ms"]) >= 0
    assert len(response.content) < 1024
    return str(error["message"])


@pytest.mark.asyncio
async def test_routing_errors(client: httpx.AsyncClient) -> None:
    check(await client.get("/nowhere"), 404, "not_found")
    response = await client.get(COMPLETIONS)
    check(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    check(await client.post(COMPLETIONS + "/", json={}), 404, "not_found")
    check(await client.get("/docs"), 404, "not_found")
    check(await client.get("/openapi.json"), 404, "not_found")


@pytest.mark.asyncio
async def test_an_unforeseen_exception_tells_its_request_id_only(
    client: httpx.AsyncClient, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def explode() -> None:
        raise RuntimeError("secret /etc/path 0x7f00")

    router = role_router(Role.PUBLIC)
    router.add_api_route("/explode", explode)
    world.app.include_router(router)
    response = await client.get("/explode", headers={"x-request-id": "mine-1"})
    message = check(response, 500, "internal_error")
    assert "secret" not in message
    assert response.headers["x-request-id"] == "mine-1"
    assert "mine-1" in caplog.text
    assert 'loramux:errors_total{code="internal_error",model_name="tiny",status="500"} 1.0' in (
        world.context.metrics.render().decode()
    )


@pytest.mark.asyncio
@pytest.mark.parametrize("given", ["a b", "x\ty", "x" * 129, 'a"b', ""])
async def test_a_request_id_that_is_not_plain_is_replaced(client: httpx.AsyncClient, given: str) -> None:
    response = await client.get("/nowhere", headers={"x-request-id": given.encode()})  # type: ignore[dict-item]
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b"[]", b"3", b'"x"', b"null", b'{"model": NaN}', b'{"temperature": Infinity}',
        b'{"a":' * 300 + b"1" + b"}" * 300, b"[" * 100_000, b'{"prompt": "\\ud800"}', b"\xff\xfe{}", b"{} {}",
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=range(15),
)  # fmt: skip
async def test_bodies_that_are_no_json_object(client: httpx.AsyncClient, world: World, body: bytes) -> None:
    response = await client.post(COMPLETIONS, content=body, headers=JSON)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.content) < 512
    assert world.engine.requests == []


@pytest.mark.asyncio
async def test_text_full_of_brackets_is_text(client: httpx.AsyncClient, world: World) -> None:
    """The limit on lists and objects counts those of the JSON, not those of a prompt about code."""
    prompt = '{"a\\\\": [1, 2]}\\"' * 5000
    response = await client.post(COMPLETIONS, json={"model": BASE, "prompt": prompt})
    check(response, 400, "context_length_exceeded", "prompt")
    response = await client.post(COMPLETIONS, json={"model": BASE, "prompt": "x", "unknown": [[]] * 40_000})
    assert "32768" in check(response, 400)


@pytest.mark.asyncio
@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {}, {"content-type": "multipart/form-data"}])
async def test_other_content_types(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    message = check(await client.post(COMPLETIONS, content=b"{}", headers=headers), 400)
    assert "application/json" in message


@pytest.mark.asyncio
async def test_json_with_a_charset_and_its_relatives(client: httpx.AsyncClient) -> None:
    body = json.dumps({"model": BASE, "prompt": "x"}).encode()
    for content_type in ("application/json; charset=utf-8", "application/vnd.api+json", "APPLICATION/JSON"):
        response = await client.post(COMPLETIONS, content=body, headers={"content-type": content_type})
        assert response.status_code == 200


@pytest.mark.asyncio
async def test_compressed_bodies_are_refused(client: httpx.AsyncClient) -> None:
    message = check(await client.post(COMPLETIONS, content=b"x", headers={**JSON, "content-encoding": "gzip"}), 400)
    assert "Content-Encoding" in message


@pytest.mark.asyncio
async def test_a_body_past_the_limit(client: httpx.AsyncClient, world: World) -> None:
    limit = world.context.config.http.max_body_bytes
    fitting = b'{"model": "nope", "prompt": "' + b"x" * (limit - 31) + b'"}'
    assert len(fitting) == limit
    assert (await client.post(COMPLETIONS, content=fitting, headers=JSON)).status_code == 404
    message = check(await client.post(COMPLETIONS, content=fitting + b" ", headers=JSON), 413, "request_too_large")
    assert str(limit) in message


@pytest.mark.asyncio
async def test_a_streamed_body_is_stopped_at_the_limit(client: httpx.AsyncClient, world: World) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 10_000
            yield b" " * 10_000

    check(await client.post(COMPLETIONS, content=endless(), headers=JSON), 413, "request_too_large")
    assert sent < 2 * world.context.config.http.max_body_bytes


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "SECRET-VALUE"}, "temperature"),
        ({"n": {"SECRET-VALUE": 1}}, "n"),
        ({"logit_bias": {"SECRET-VALUE": 1}}, "logit_bias"),
        ({"stop": ["SECRET-VALUE", 5]}, "stop.1"),
        ({"stream": "SECRET-VALUE"}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": "SECRET-VALUE"}}, "stream_options.include_usage"),
        ({"prompt": {"SECRET-VALUE": 1}}, "prompt"),
        ({"SECRET-VALUE": 1, "model": ["SECRET-VALUE"]}, "model"),
    ],
)
async def test_validation_names_the_field_and_repeats_nothing(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(COMPLETIONS, json={"model": BASE, "prompt": "x"} | fields)
    message = check(response, 400, None, param)
    assert "SECRET" not in response.text
    assert param in message


@pytest.mark.asyncio
async def test_a_missing_field(client: httpx.AsyncClient) -> None:
    check(await client.post(COMPLETIONS, json={"prompt": "x"}), 400, None, "model")
    check(await client.post(COMPLETIONS, json={"model": BASE}), 400, None, "prompt")
    check(await client.post(COMPLETIONS, json={"model": "", "prompt": "x"}), 400, None, "model")


def test_over_a_socket(live: LiveServer) -> None:
    """A body and headers far past the limits, read by a real client."""
    response = httpx.post(live.url + COMPLETIONS, content=b"x" * 10_000_000, headers=JSON)
    check(response, 413, "request_too_large")
    response = httpx.post(live.url + COMPLETIONS, json={"model": BASE, "prompt": "x"}, headers={"x-big": "x" * 33_000})
    check(response, 431, "headers_too_large")
    assert live.world.engine.requests == []
    assert httpx.get(live.url + "/health").status_code == 200


def test_a_megabyte_of_headers_is_refused(live: LiveServer) -> None:
    try:
        status = httpx.get(live.url + "/health", headers={"x-big": "x" * 1_000_000}).status_code
    except httpx.TransportError:  # answered and closed while we were still sending
        status = 400
    assert 400 <= status < 500
    assert live.world.engine.requests == []
    assert httpx.get(live.url + "/health").status_code == 200


@pytest.mark.asyncio
async def test_a_body_that_stalls_is_given_up(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.json_request.STALL_SECONDS", 0.05)

    async def stalling() -> AsyncIterator[bytes]:
        yield b'{"model": '
        await asyncio.sleep(30)
        yield b'"tiny", "prompt": "x"}'

    response = await client.post(COMPLETIONS, content=stalling(), headers=JSON)
    check(response, 408, "request_timeout")
    assert response.headers["connection"] == "close"
    assert world.engine.requests == []


def test_a_client_that_leaves_its_body_unfinished_is_no_error(live: LiveServer) -> None:
    address = httpx.URL(live.url)
    with socket.create_connection((address.host, address.port or 0)) as sock:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
        )
        sock.sendall(head + b"{")
        assert httpx.get(live.url + "/nowhere").status_code == 404
    assert httpx.get(live.url + "/nowhere").status_code == 404
    errors = [line for line in live.world.context.metrics.render().decode().splitlines() if "errors_total{" in line]
    assert errors == ['loramux:errors_total{code="not_found",model_name="tiny",status="404"} 2.0']
