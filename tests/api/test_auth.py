"""Keys and roles: every route has one, and the matrix of route × key × status is what auth.py says."""

import hashlib

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRouter, iter_route_contexts
from starlette.routing import BaseRoute

from server.api.auth import KeyRing, Role, RoleRoute, check_binding, is_loopback, role_router
from server.config import HTTPConfig
from tests.api.conftest import World, client_for, make_world, with_keys
from tests.api.fakes import BASE

EXPECTED_ROLES = {
    "GET /health": Role.PUBLIC,
    "HEAD /health": Role.PUBLIC,
    "GET /version": Role.PUBLIC,
    "GET /metrics": Role.PUBLIC,
    "GET /v1/models": Role.INFERENCE,
    "GET /v1/models/{model:path}": Role.INFERENCE,
    "POST /v1/completions": Role.INFERENCE,
    "POST /v1/chat/completions": Role.INFERENCE,
    "GET /v1/adapters": Role.ADMIN,
    "POST /v1/adapters": Role.ADMIN,
    "POST /v1/adapters/upload": Role.ADMIN,
    "POST /v1/adapters/{name:path}/validate": Role.ADMIN,
    "POST /v1/adapters/{name:path}/rollback": Role.ADMIN,
    "GET /v1/adapters/{name:path}": Role.ADMIN,
    "PATCH /v1/adapters/{name:path}": Role.ADMIN,
    "DELETE /v1/adapters/{name:path}": Role.ADMIN,
    "GET /v1/aliases": Role.ADMIN,
    "GET /v1/aliases/{name:path}": Role.ADMIN,
    "PUT /v1/aliases/{name:path}": Role.ADMIN,
    "DELETE /v1/aliases/{name:path}": Role.ADMIN,
    "POST /v1/aliases/{name:path}/rollback": Role.ADMIN,
    "POST /v1/load_lora_adapter": Role.ADMIN,
    "POST /v1/unload_lora_adapter": Role.ADMIN,
}


def roles(app: FastAPI) -> dict[str, Role | None]:
    """Method and path → the route's role, None for a route that declares none."""
    found: dict[str, Role | None] = {}
    for route in iter_route_contexts(app.routes):
        original: BaseRoute = route.original_route
        for method in route.methods or {"ANY"}:
            found[f"{method} {route.path}"] = original.role if isinstance(original, RoleRoute) else None
    return found


def test_every_route_has_the_role_it_should(world: World) -> None:
    assert roles(world.app) == EXPECTED_ROLES


def test_a_route_without_a_role_would_be_seen(world: World) -> None:
    stray = APIRouter()
    stray.add_api_route("/stray", lambda: None)
    world.app.include_router(stray)
    world.app.add_route("/older", lambda _request: None)
    found = roles(world.app)
    assert found["GET /stray"] is None
    assert found["GET /older"] is None


API, ADMIN, WRONG = "inference-key", "admin-key", "wrong-key"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("config", "role", "statuses"),  # statuses for: no key, wrong key, api key, admin key
    [
        (HTTPConfig(), Role.PUBLIC, (200, 200, 200, 200)),
        (HTTPConfig(), Role.INFERENCE, (200, 200, 200, 200)),
        (HTTPConfig(), Role.ADMIN, (200, 200, 200, 200)),
        (with_keys(api_key=API), Role.PUBLIC, (200, 200, 200, 200)),
        (with_keys(api_key=API), Role.INFERENCE, (401, 401, 200, 401)),
        (with_keys(api_key=API), Role.ADMIN, (401, 401, 200, 401)),
        (with_keys(api_key=API, admin_api_key=ADMIN), Role.PUBLIC, (200, 200, 200, 200)),
        (with_keys(api_key=API, admin_api_key=ADMIN), Role.INFERENCE, (401, 401, 200, 200)),
        (with_keys(api_key=API, admin_api_key=ADMIN), Role.ADMIN, (401, 401, 403, 200)),
        (with_keys(admin_api_key=ADMIN), Role.INFERENCE, (200, 200, 200, 200)),
        (with_keys(admin_api_key=ADMIN), Role.ADMIN, (401, 401, 401, 200)),
    ],
)
async def test_the_matrix(config: HTTPConfig, role: Role, statuses: tuple[int, ...]) -> None:
    world = make_world(config)
    router = role_router(role)
    router.add_api_route("/probe", lambda: {"ok": True})
    world.app.include_router(router)
    async with client_for(world.app) as client:
        for key, status in zip((None, WRONG, API, ADMIN), statuses, strict=True):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            response = await client.get("/probe", headers=headers)
            assert response.status_code == status, key
            if status != 200:
                error = response.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert response.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
                assert error["code"] == ("insufficient_permissions" if status == 403 else "invalid_api_key")


@pytest.mark.asyncio
async def test_every_route_that_is_not_public_asks_for_a_key() -> None:
    world = make_world(with_keys(api_key=API, admin_api_key=ADMIN))
    async with client_for(world.app) as client:
        for name, role in EXPECTED_ROLES.items():
            method, path = name.split()
            path = path.replace("{model:path}", BASE).replace("{name:path}", "sql")
            without = await client.request(method, path)
            assert (without.status_code == 401) == (role is not Role.PUBLIC), name
            if role is Role.ADMIN:
                lesser = await client.request(method, path, headers={"authorization": f"Bearer {API}"})
                assert lesser.status_code == 403, name
    assert world.engine.requests == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "headers",
    [
        [("host", "x/health?a=")],
        [("host", "x"), ("host", "health")],
        [("x-original-url", "/health"), ("x-forwarded-path", "/health"), ("x-forwarded-prefix", "/health")],
        [("authorization", f"Bearer {API}"), ("authorization", "Bearer nothing")],
        [("authorization", f"Basic {API}")],
        [("authorization", API)],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {API}x")],
        [("authorization", f"Bearer {API.upper()}")],
    ],
)
async def test_headers_that_must_not_open_a_route(headers: list[tuple[str, str]]) -> None:
    world = make_world(with_keys(api_key=API))
    async with client_for(world.app) as client:
        for path in ("/v1/models", "//v1/models", "/v1/models/", "/health/../v1/models", "/v1/models/%2e%2e/health"):
            response = await client.get(path, headers=headers)
            assert response.status_code in (401, 404), path


@pytest.mark.asyncio
async def test_the_key_is_asked_for_before_the_body_is_looked_at() -> None:
    world = make_world(with_keys(api_key=API))
    async with client_for(world.app) as client:
        response = await client.post("/v1/completions", content=b"x" * 10_000_000)
        assert response.status_code == 401


@pytest.mark.asyncio
async def test_a_key_is_never_repeated() -> None:
    world = make_world(with_keys(api_key=API, admin_api_key=ADMIN))
    async with client_for(world.app) as client:
        response = await client.get("/v1/models", headers={"authorization": f"Bearer {WRONG}"})
        shown = response.text + repr(world.context) + repr(world.app.state.keys) + repr(vars(world.app.state))
    assert all(key not in shown for key in (API, ADMIN, WRONG))
    assert hashlib.sha256(API.encode()).hexdigest() not in shown


def test_an_empty_key_is_refused() -> None:
    for config in (with_keys(api_key=""), with_keys(admin_api_key="  ")):
        with pytest.raises(ValueError, match="is empty"):
            KeyRing(config)
        with pytest.raises(ValueError, match="is empty"):
            check_binding(config)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("192.168.1.1", False), ("example.org", False), ("localhost.evil", False),
        ("", False),
    ],
)  # fmt: skip
def test_without_a_key_only_loopback_is_bound(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected
    if expected:
        check_binding(HTTPConfig(host=host))
    else:
        with pytest.raises(ValueError, match="--api-key"):
            check_binding(HTTPConfig(host=host))
        with pytest.raises(ValueError, match="--api-key"):
            check_binding(HTTPConfig(host=host, admin_api_key="k"))
    check_binding(HTTPConfig(host=host, api_key="k"))


@pytest.mark.asyncio
async def test_models_are_listed_to_an_inference_key_only(world: World) -> None:
    client: httpx.AsyncClient
    async with client_for(make_world(with_keys(api_key=API)).app) as client:
        assert (await client.get("/v1/models")).status_code == 401
