"""A running server's /v1/adapters routes, from the standard library alone. Knows nothing of files or models."""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TIMEOUT_SECONDS = 300  # a load reads and checks the whole adapter before it answers


class ServerSaidNo(Exception):
    """The server could not be reached or answered with an error; the message is for a person."""


@dataclass(frozen=True, slots=True)
class AdapterClient:
    """One server's /v1/adapters routes."""

    url: str
    api_key: str | None = None

    def list(self) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = self._call("GET", "/v1/adapters")["data"]
        return data

    def load(self, name: str, source: str, *, load_inplace: bool) -> dict[str, Any]:
        return self._call("POST", "/v1/adapters", {"name": name, "source": source, "load_inplace": load_inplace})

    def unload(self, name: str) -> dict[str, Any]:
        return self._call("DELETE", f"/v1/adapters/{urllib.parse.quote(name, safe='/')}")

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        address = self.url.rstrip("/") + path
        if not address.startswith(("http://", "https://")):
            raise ServerSaidNo(f"--url {self.url} is not an address; write http://host:port")
        request = urllib.request.Request(address, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as reply:
                answer: dict[str, Any] = json.loads(reply.read() or b"{}")
                return answer
        except urllib.error.HTTPError as error:
            raise ServerSaidNo(_explain(error)) from error
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            raise ServerSaidNo(f"no server answers at {self.url} ({why}); start one, or set --url") from error


def _explain(error: urllib.error.HTTPError) -> str:
    try:
        body = json.loads(error.read())
        message = str(body["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = error.reason
    hint = "; set --admin-api-key or LORAMUX_ADMIN_API_KEY" if error.code in (401, 403) else ""
    return f"{message} ({error.code}){hint}"
