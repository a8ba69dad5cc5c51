"""The adapter routes of a server over real HTTP, without adapters: what a client may be told, and what it sent."""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

VERSION = "ab" * 32
TOTAL = 1 << 20


def description(name: str, **changes: Any) -> dict[str, Any]:
    report = {"num_modules": 2, "modules": {"q_proj": 2}, "lora_rank": 8, "warnings": ["B is zero"], "base_model": None}
    fields = {
        "object": "adapter",
        "name": name,
        "version": VERSION,
        "state": "ready",
        "tier": "host",
        "lora_rank": 8,
        "num_bytes": 2048,
        "leases": 1,
        "source": f"/a/{name}",
        "pending": None,
        "failure": None,
        "pin": False,
        "report": report,
    }
    return {**fields, **changes}


class FakeAdapterServer:
    """`slow` is name → polls until it is loaded; `broken` name → (code, why) that its load ends with."""

    def __init__(self) -> None:
        self.adapters: dict[str, dict[str, Any]] = {}
        self.aliases: dict[str, list[dict[str, Any]]] = {}
        self.received: list[tuple[str, str, str | None, Any]] = []
        self.slow: dict[str, int] = {}
        self.unit = "bytes"  # what loads count
        self.broken: dict[str, tuple[str, str]] = {}
        self.draining: set[str] = set()
        self.quota = 1 << 30
        self.streams: list[list[dict[str, Any]]] = []  # what each stream tells; a stream too many is refused
        self.holds_streams = False  # keep the last one open
        self.closing = threading.Event()

    # Each returns (status, body).

    def load(self, name: str, source: str, settings: dict[str, Any], wait: float) -> tuple[int, Any]:
        if name in self.broken and not self.slow.get(name):
            return refusal(400, *self.broken[name])
        new = name not in self.adapters
        adapter = description(name, source=source, pin=settings.get("pin", False))
        if not wait or self.slow.get(name):
            before = self.adapters.get(name, {"version": None, "lora_rank": None, "num_bytes": None, "source": None})
            adapter |= {key: before[key] for key in ("version", "lora_rank", "num_bytes", "source")}
            adapter |= {"state": "fetching" if new else "ready", "pending": source, "report": None}
            adapter["progress"] = {"unit": self.unit, "done": 0, "total": TOTAL}
            self.adapters[name] = adapter
            return 202, adapter
        self.adapters[name] = adapter
        return (201, {**adapter, "outcome": "loaded"}) if new else (200, {**adapter, "outcome": "replaced"})

    def describe(self, name: str) -> tuple[int, Any]:
        adapter = self.adapters.get(name)
        if adapter is None:
            return refusal(404, "adapter_not_found", f"no adapter is registered as {name!r}")
        if adapter["pending"]:
            self._go_on(name, adapter)
        return 200, self.adapters[name]

    def _go_on(self, name: str, adapter: dict[str, Any]) -> None:
        left = self.slow[name] = self.slow.get(name, 0) - 1
        done = TOTAL // (left + 1) if left >= 0 else TOTAL
        adapter["progress"] = {"unit": self.unit, "done": done, "total": TOTAL}
        if left <= 0:
            source, fault = adapter["pending"], self.broken.get(name)
            self.adapters[name] = description(name, source=source)
            if fault is not None:
                failure = {"code": fault[0], "why": fault[1]}
                self.adapters[name] |= {"state": "failed", "failure": failure, "version": None}

    def change(self, name: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, adapter = self.describe(name)
        return (status, {**adapter, **body}) if status == 200 else (status, adapter)

    def unload(self, name: str) -> tuple[int, Any]:
        if self.adapters.pop(name, None) is None:
            return refusal(404, "adapter_not_found", f"no adapter is registered as {name!r}")
        answer = {"object": "adapter", "name": name, "version": VERSION}
        if name in self.draining:
            return 202, {**answer, "state": "draining"}
        return 200, {**answer, "state": "unloaded", "freed": {"host_bytes": 2048, "device_bytes": 1 << 20}}

    def alias(self, method: str, name: str, body: Any) -> tuple[int, Any]:
        if method == "PUT":
            self.aliases[name] = body["targets"]
        if name not in self.aliases:
            return refusal(404, "alias_not_found", f"no alias is registered as {name!r}")
        targets = self.aliases.pop(name) if method == "DELETE" else self.aliases[name]
        return 200, {"object": "alias", "name": name, "targets": targets}


def refusal(status: int, code: str, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeAdapterServer

    def _answer(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        key = self.headers.get("Authorization")
        length = int(self.headers.get("Content-Length") or 0)
        if url.path == "/v1/adapters/upload" and length > self.fake.quota:
            self.close_connection = True
            return self._send(*refusal(413, "upload_too_large", "over the quota of uploads"))
        body = self._body(length)
        self.fake.received.append((self.command, self.path, key, body))
        if key == "Bearer wrong":
            return self._send(*refusal(401, "invalid_api_key", "not one of this server's keys"))
        if query.get("watch"):
            return self._stream()
        self._send(*self._route(url.path, query, body))

    def _body(self, length: int) -> Any:
        data = self.rfile.read(length)
        kind = self.headers.get("Content-Type", "")
        if kind.startswith("multipart/"):
            message = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + data)
            parts = message.get_payload()
            assert isinstance(parts, list)
            return {part.get_filename(): part.get_payload(decode=True) for part in parts}  # type: ignore[union-attr]
        return json.loads(data) if data else None

    def _route(self, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        fake, wait = self.fake, float(query.get("wait", 0))
        if path == "/v1/adapters" and self.command == "GET":
            return 200, {"object": "list", "data": list(fake.adapters.values())}
        if path == "/v1/adapters":
            return fake.load(body["name"], body["source"], body, wait)
        if path == "/v1/adapters/upload":
            return fake.load(query["name"], "upload:1", query, wait)
        if path == "/v1/aliases":
            return 200, {"data": [fake.alias("GET", name, None)[1] for name in fake.aliases]}
        kind, name, act = re.fullmatch(r"/v1/(adapters|aliases)/(.*?)(/rollback)?", unquote(path)).groups()  # type: ignore[union-attr]
        if kind == "aliases":
            return fake.alias("GET" if act else self.command, name, body)
        if act or self.command == "GET":
            return fake.describe(name)
        return fake.change(name, body) if self.command == "PATCH" else fake.unload(name)

    def _stream(self) -> None:
        if not self.fake.streams:
            return self._send(*refusal(503, "server_unavailable", "no stream is left"))
        events = self.fake.streams.pop(0)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            text = f": a comment\n\nevent: other\ndata: {{}}\n\nevent: adapter\ndata: {json.dumps(event)}\n\n"
            self._chunk(text.encode())
        while self.fake.holds_streams and not self.fake.streams and not self.fake.closing.wait(0.05):
            pass
        self._chunk(b"")
        self.close_connection = True

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        if self.close_connection:  # let the reply be read before the connection is reset
            time.sleep(0.2)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(fake: FakeAdapterServer) -> Iterator[str]:
    """Its address, for as long as the block lasts."""
    handler = type("Handler", (_Handler,), {"fake": fake})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        fake.closing.set()
        server.shutdown()
        thread.join()
