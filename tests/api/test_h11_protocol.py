"""What is no HTTP gets the error shape too, over a real socket; the server goes on."""

import json
import socket

import pytest

from tests.api.conftest import LiveServer


def exchange(live: LiveServer, *parts: bytes) -> tuple[str, dict[str, str], bytes]:
    """Send `parts`, then read to the end: status line, headers, body."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        for part in parts:
            sock.sendall(part)
        received = b""
        while chunk := sock.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return status, {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}, body


HOST = b"Host: x\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        (b"\x16\x03\x01 what is this\r\n\r\n",),
        (b"GET /health HTTP/1.1\r\n\r\n",),
        (b"GET /health HTTP/1.1\r\n" + HOST + HOST + b"\r\n",),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"no colon\r\n\r\n",),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"x-big: ", *[b"x" * 65_536] * 16, b"\r\n\r\n"),
        (
            b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"content-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\nnot a length\r\n",
        ),
    ],
    ids=["garbage", "no host", "two hosts", "no colon", "a megabyte", "bad chunk"],
)
def test_the_parsers_refusal_has_the_error_shape(live: LiveServer, parts: tuple[bytes, ...]) -> None:
    status, headers, body = exchange(live, *parts)
    assert status == "HTTP/1.1 400 Bad Request"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"].startswith("req_")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
    assert 'loramux:errors_total{code="none",model_name="tiny",status="400"} 1.0' in (
        live.world.context.metrics.render().decode()
    )
    status, _, _ = exchange(live, b"GET /health HTTP/1.1\r\n" + HOST + b"connection: close\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"


def test_garbage_after_a_reply_closes_the_connection(live: LiveServer) -> None:
    status, _, body = exchange(live, b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n", b"garbage\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert b"HTTP/1.1 400 Bad Request" in body
