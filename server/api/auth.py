"""Who may call what: API keys, roles, and the route class that checks both before a byte of the body is read.

Knows nothing of models, adapters or JSON fields. The key is looked up by the route that matched, never by a path
rebuilt from Host or URL, so there is no second reading of the path to disagree with the first.

| keys set                      | PUBLIC | INFERENCE                | ADMIN         |
|-------------------------------|--------|--------------------------|---------------|
| none (loopback hosts only)    | open   | open                     | open          |
| `--api-key`                   | open   | api key                  | api key       |
| `--api-key --admin-api-key`   | open   | api key or admin key     | admin key     |
| `--admin-api-key` (loopback)  | open   | open                     | admin key     |
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Any, ClassVar

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from server.api.json_request import JSONRequest
from server.config import HTTPConfig
from server.errors import Forbidden, InvalidAPIKey

_LOOPBACK_NAMES = frozenset({"localhost", "localhost.localdomain", "ip6-localhost"})


class Role(StrEnum):
    """What a route asks of its caller."""

    PUBLIC = "public"
    INFERENCE = "inference"
    ADMIN = "admin"


class KeyRing:
    """The digests of the configured keys. The keys themselves are not kept, so nothing can print them."""

    __slots__ = ("_accepted", "_known")

    def __init__(self, config: HTTPConfig) -> None:
        api, admin = _key_digest(config.api_key, "--api-key"), _key_digest(config.admin_api_key, "--admin-api-key")
        self._known = tuple(digest for digest in (api, admin) if digest is not None)
        self._accepted: dict[Role, tuple[bytes, ...]] = {
            Role.PUBLIC: (),
            Role.INFERENCE: self._known if api is not None else (),
            Role.ADMIN: (admin,) if admin is not None else self._known,
        }

    def check(self, role: Role, authorization: list[str]) -> None:
        """Let the caller pass, or raise InvalidAPIKey (no such key) or Forbidden (a key of lesser role).

        `authorization` holds every Authorization header of the request; two of them are as good as none.
        """
        accepted = self._accepted[role]
        if not accepted:
            return
        digest = _bearer_digest(authorization)
        if digest is None:
            raise InvalidAPIKey("No API key was given; send the header 'Authorization: Bearer <key>'.")
        if _matches(digest, accepted):
            return
        if _matches(digest, self._known):
            raise Forbidden("This API key may not administer adapters; use the key given as --admin-api-key.")
        raise InvalidAPIKey("The API key in the Authorization header is not one of this server's keys.")


def _key_digest(key: str | None, option: str) -> bytes | None:
    if key is None:
        return None
    if not key.strip():
        raise ValueError(f"{option} is empty; give a key or leave the option out")
    return hashlib.sha256(key.encode()).digest()


def _bearer_digest(authorization: list[str]) -> bytes | None:
    if len(authorization) != 1:
        return None
    scheme, _, key = authorization[0].partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        return None
    return hashlib.sha256(key.strip().encode()).digest()


def _matches(digest: bytes, known: tuple[bytes, ...]) -> bool:
    """Every known digest is compared, whichever matches, so the time taken does not tell which key it was."""
    return sum([hmac.compare_digest(digest, each) for each in known]) > 0


class RoleRoute(APIRoute):
    """A route with a role. It checks the key, then reads the body within its limit, then lets FastAPI validate."""

    role: ClassVar[Role]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        has_body = self.body_field is not None

        async def checked(request: Request) -> Response:
            request.app.state.keys.check(self.role, request.headers.getlist("authorization"))
            if has_body:
                limit = request.app.state.context.config.http.max_body_bytes
                request = await JSONRequest.read(request, max_bytes=limit)
            return await handler(request)

        return checked


class PublicRoute(RoleRoute):
    role = Role.PUBLIC


class InferenceRoute(RoleRoute):
    role = Role.INFERENCE


class AdminRoute(RoleRoute):
    role = Role.ADMIN


_ROUTE_CLASSES: dict[Role, type[RoleRoute]] = {
    route_class.role: route_class for route_class in (PublicRoute, InferenceRoute, AdminRoute)
}


def role_router(role: Role, *, prefix: str = "") -> APIRouter:
    """A router all of whose routes ask for `role`."""
    return APIRouter(prefix=prefix, route_class=_ROUTE_CLASSES[role])


def is_loopback(host: str) -> bool:
    """Whether a socket bound to `host` is reachable from this machine alone."""
    if host.lower() in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(config: HTTPConfig) -> None:
    """Raise ValueError when a key is empty, or the server would take requests from other machines without one."""
    KeyRing(config)
    if config.api_key is None and not is_loopback(config.host):
        raise ValueError(
            f"--host {config.host} is reachable from other machines and no --api-key is set; "
            "set --api-key, or bind to 127.0.0.1"
        )
