"""A running server's /v1/adapters and /v1/aliases routes, from the standard library alone. Knows nothing of models."""

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from server.adapter_upload import AdapterUpload
from server.event_lines import read_events

_TIMEOUT_SECONDS = 300  # of one reply; a load is asked for with `wait`, which ends long before
_JSON = {"Content-Type": "application/json"}

Query = Mapping[str, str | float | bool | Sequence[str] | None]


class ServerSaidNo(Exception):
    """The server could not be reached or answered with an error; the message is for a person."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status  # None: it could not be reached


@dataclass(frozen=True, slots=True)
class Reply:
    """`status` 202: it is acknowledged and not done yet."""

    status: int
    body: dict[str, Any]

    @property
    def is_done(self) -> bool:
        return self.status != 202


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What is asked of an adapter beside its source; None = the server's default, or as it is."""

    pin: bool | None = None
    ttl: float | None = None
    priority: int | None = None
    load_inplace: bool | None = None
    ignore: tuple[str, ...] = ()  # patterns of tensors to leave out
    moe_lora_b_layout: str | None = None

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


@dataclass(frozen=True, slots=True)
class AdapterClient:
    """One server's routes for adapters and aliases. Everything raises ServerSaidNo."""

    url: str
    api_key: str | None = None

    def list(self) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = self._call("GET", "/v1/adapters").body["data"]
        return data

    def describe(self, name: str) -> dict[str, Any]:
        return self._call("GET", _adapter(name)).body

    def load(self, name: str, source: str, settings: AdapterSettings, *, wait: float) -> Reply:
        """`wait` is how many seconds the server takes before it answers 202."""
        body = {"name": name, "source": source, **settings.given()}
        return self._call("POST", "/v1/adapters", body, {"wait": wait or None})

    def upload(
        self, name: str, upload: AdapterUpload, settings: AdapterSettings, *, wait: float, sent: Callable[[int], None]
    ) -> Reply:
        """Send an adapter's files; `sent` is told of the bytes of each piece."""
        query = {"name": name, **settings.given(), "wait": wait or None}
        headers = {"Content-Type": upload.content_type, "Content-Length": str(upload.num_bytes)}
        return self._send_pieces("/v1/adapters/upload" + _encoded(query), upload.pieces(sent), headers)

    def unload(self, name: str, *, mode: str | None = None, deadline: float | None = None) -> Reply:
        query: Query = {"mode": mode, "deadline": deadline}
        return self._call("DELETE", _adapter(name), query=query, timeout=_TIMEOUT_SECONDS + (deadline or 0.0))

    def change(self, name: str, settings: AdapterSettings) -> dict[str, Any]:
        return self._call("PATCH", _adapter(name), settings.given()).body

    def roll_back(self, name: str) -> dict[str, Any]:
        return self._call("POST", _adapter(name) + "/rollback").body

    def aliases(self) -> Sequence[dict[str, Any]]:
        data: Sequence[dict[str, Any]] = self._call("GET", "/v1/aliases").body["data"]
        return data

    def describe_alias(self, name: str) -> dict[str, Any]:
        return self._call("GET", _alias(name)).body

    def put_alias(self, name: str, targets: Iterable[tuple[str, float]]) -> dict[str, Any]:
        body = {"targets": [{"adapter": adapter, "weight": weight} for adapter, weight in targets]}
        return self._call("PUT", _alias(name), body).body

    def remove_alias(self, name: str) -> None:
        self._call("DELETE", _alias(name))

    def roll_back_alias(self, name: str) -> dict[str, Any]:
        return self._call("POST", _alias(name) + "/rollback").body

    def watch(self) -> Iterator[dict[str, Any]]:
        """A description of every adapter, then of each that changes; ends when the server closes the stream."""
        request = self._request("GET", "/v1/adapters?watch=true", None, {"Accept": "text/event-stream"})
        with self._failures_told(), urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as reply:
            for event, data in read_events(reply):
                if event == "adapter":
                    yield json.loads(data)

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Query | None = None,
        *,
        timeout: float = _TIMEOUT_SECONDS,
    ) -> Reply:
        data = None if body is None else json.dumps(body).encode()
        request = self._request(method, path + _encoded(query or {}), data, _JSON)
        with self._failures_told(), urllib.request.urlopen(request, timeout=timeout) as reply:
            return Reply(reply.status, json.loads(reply.read() or b"{}"))

    def _request(
        self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]
    ) -> urllib.request.Request:
        address = self.url.rstrip("/") + path
        if not address.startswith(("http://", "https://")):
            raise ServerSaidNo(f"--url {self.url} is not an address; write http://host:port")
        return urllib.request.Request(address, data=data, headers={**headers, **self._key()}, method=method)

    def _key(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def _send_pieces(self, path: str, pieces: Iterable[bytes], headers: Mapping[str, str]) -> Reply:
        """A long body. A server that refuses it early is heard out: its reason says more than a broken pipe."""
        request = self._request("POST", path, None, headers)
        kind = http.client.HTTPSConnection if request.type == "https" else http.client.HTTPConnection
        with self._failures_told(), closing(kind(request.host, timeout=_TIMEOUT_SECONDS)) as connection:
            connection.putrequest("POST", request.selector)
            for name, value in request.header_items():
                connection.putheader(name, value)
            connection.endheaders()
            try:
                for piece in pieces:
                    connection.send(piece)
            except (BrokenPipeError, ConnectionResetError):
                pass
            reply = connection.getresponse()
            data = reply.read()
            if reply.status >= 400:
                raise ServerSaidNo(_explain(reply.status, reply.reason, data), reply.status)
            return Reply(reply.status, json.loads(data or b"{}"))

    @contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            yield
        except urllib.error.HTTPError as error:
            with error:
                why = _explain(error.code, error.reason, error.read())
            raise ServerSaidNo(why, error.code) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise ServerSaidNo(f"{self.url} did not answer in time; it may still do what it was asked") from error
            raise ServerSaidNo(f"no server answers at {self.url} ({cause}); start one, or set --url") from error


def _adapter(name: str) -> str:
    return f"/v1/adapters/{urllib.parse.quote(name, safe='/')}"


def _alias(name: str) -> str:
    return f"/v1/aliases/{urllib.parse.quote(name, safe='/')}"


def _encoded(query: Query) -> str:
    """?a=1&b=true&c=x&c=y of what is given; nothing for nothing."""
    given = {
        key: str(value).lower() if isinstance(value, bool) else value
        for key, value in query.items()
        if value is not None
    }
    return f"?{urllib.parse.urlencode(given, doseq=True)}" if given else ""


def _explain(status: int, reason: str, data: bytes) -> str:
    try:
        message = str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = reason
    hint = "; set --admin-api-key or LORAMUX_ADMIN_API_KEY" if status in (401, 403) else ""
    return f"{message} ({status}){hint}"
