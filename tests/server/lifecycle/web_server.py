"""A web server for tests on a port of its own: a table of paths, and every request it saw."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = Callable[["Handler"], None]


@dataclass
class WebServer:
    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    fallback: Answer | None = None
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # (path, headers in lower case)
    over: threading.Event = field(default_factory=threading.Event)  # set when the server ends, for answers that wait

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self, folder: Path, at: str) -> None:
        for path in folder.iterdir():
            self.answers[f"{at}/{path.name}"] = whole(path.read_bytes())

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: WebServer

    def do_GET(self) -> None:
        self.web.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        answer = self.web.answers.get(self.path.partition("?")[0], self.web.fallback or status(404))
        answer(self)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def send(self, code: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def whole(body: bytes, **headers: str) -> Answer:
    extra = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.send(200, {"Content-Length": str(len(body)), **extra}, body)


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    extra = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.send(code, {"Content-Length": str(len(body)), **extra}, body)


def redirect(to: str, code: int = 302) -> Answer:
    return status(code, location=to)


def cut_off(body: bytes, declared: int) -> Answer:
    """Fewer bytes than were declared, then the connection ends."""

    def answer(handler: Handler) -> None:
        handler.send(200, {"Content-Length": str(declared), "Connection": "close"}, body)
        handler.close_connection = True

    return answer


def chunked(chunk: bytes, count: int) -> Answer:
    """Without a size; `count` chunks, or as many as somebody takes."""

    def answer(handler: Handler) -> None:
        handler.send(200, {"Transfer-Encoding": "chunked"}, b"")
        try:
            for _ in range(count):
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            handler.close_connection = True

    return answer


def hanging(body: bytes, declared: int) -> Answer:
    """Some bytes, and then nothing until the server ends."""

    def answer(handler: Handler) -> None:
        handler.send(200, {"Content-Length": str(declared)}, body)
        handler.web.over.wait(60)
        handler.close_connection = True

    return answer


@contextmanager
def web_server() -> Iterator[WebServer]:
    class Bound(Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    Bound.web = WebServer(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Bound.web
    finally:
        Bound.web.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
