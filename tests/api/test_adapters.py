"""/v1/adapters: statuses, the description, the refusal with its parts, draining."""

from pathlib import Path
from typing import Any

import pytest

from server.config import HTTPConfig
from tests.adapters.hostile import write_config
from tests.api.adapter_world import AdapterWorld, adapter_world


async def post(world: AdapterWorld, **body: Any) -> tuple[int, dict[str, Any]]:
    """Load and wait for the end."""
    reply = await world.client.post("/v1/adapters?wait=600", json=body)
    return reply.status_code, reply.json()


@pytest.mark.asyncio
async def test_load_again_replace_unload(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        a, b = world.adapter("a"), world.adapter("b", seed=1)
        status, created = await post(world, name="org/sql", source=a)
        assert (status, created["outcome"], created["name"]) == (201, "loaded", "org/sql")
        assert created["report"]["num_modules"] == 3
        assert created["report"]["delta_norms"].keys() == {"q_proj", "v_proj"}
        status, again = await post(world, name="org/sql", source=a)
        assert (status, again["outcome"], again["version"]) == (200, "unchanged", created["version"])
        status, taken = await post(world, name="org/sql", source=b)
        assert (status, taken["error"]["code"]) == (400, "adapter_already_loaded")
        status, replaced = await post(world, name="org/sql", source=b, load_inplace=True)
        assert (status, replaced["outcome"]) == (200, "replaced")
        assert replaced["version"] != created["version"]
        one = (await world.client.get("/v1/adapters/org/sql")).json()
        assert one == {key: value for key, value in replaced.items() if key != "outcome"}
        gone = (await world.client.delete("/v1/adapters/org/sql")).json()
        assert (gone["deleted"], gone["state"], gone["version"]) == (True, "unloaded", one["version"])
        assert (await world.client.get("/v1/adapters")).json() == {"object": "list", "data": []}


@pytest.mark.asyncio
async def test_delete_while_in_use_drains(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await world.service.load("sql", world.adapter("a"))
        lease = world.service.acquire("sql")
        assert lease is not None
        assert (await world.client.delete("/v1/adapters/sql")).json()["state"] == "draining"
        listed = (await world.client.get("/v1/adapters")).json()["data"]
        assert [(entry["state"], entry["leases"]) for entry in listed] == [("draining", 1)]
        assert (await world.client.delete("/v1/adapters/sql")).status_code == 404
        lease.release()
        await world.settle()
        assert (await world.client.get("/v1/adapters")).json()["data"] == []


@pytest.mark.asyncio
async def test_delete_of_one_of_two_names_drains_nothing(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        folder = world.adapter("a")
        for name in ("sql", "alias"):
            assert (await post(world, name=name, source=folder, load_inplace=None))[0] == 201
        lease = world.service.acquire("alias")
        assert lease is not None
        assert (await world.client.delete("/v1/adapters/sql")).json()["state"] == "unloaded"
        assert (await world.client.delete("/v1/adapters/alias")).json()["state"] == "draining"
        lease.release()


@pytest.mark.asyncio
async def test_refusal_says_what_and_why(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        folder = world.adapter("a")
        write_config(Path(folder), {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "layer_replication": [[0, 2]]})
        status, body = await post(world, name="sql", source=folder)
        error = body["error"]
        assert status == 400
        assert error.keys() == {"message", "type", "param", "code", "feature", "tensor", "why", "fix"}
        assert error["code"] == "adapter_unsupported"
        assert "layer_replication" in error["feature"]
        assert error["fix"] and error["why"] in error["message"]
        assert num_errors(world, 400, "adapter_unsupported") == 1


def num_errors(world: AdapterWorld, status: int, code: str) -> float:
    labels = f'{{code="{code}",model_name="org/base",status="{status}"}}'
    (line,) = [each for each in world.metrics.render().decode().splitlines() if f"errors_total{labels}" in each]
    return float(line.rpartition(" ")[2])


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"name": "sql", "source": "/nowhere/at/all"}, 404, "adapter_not_found"),
        ({"name": "org/base", "source": "a"}, 400, "adapter_name_invalid"),
        ({"name": "../x", "source": "a"}, 400, "adapter_name_invalid"),
        ({"name": "sql", "source": "/a\0b"}, 404, "adapter_not_found"),
        ({"name": "sql"}, 400, None),
        ({"name": 3, "source": "a"}, 400, None),
        ({"name": "sql", "source": "x" * 5000}, 400, None),
        ({"name": "sql", "source": "a", "load_inplace": "yes"}, 400, None),
        ({"name": None, "source": "a"}, 400, None),
    ],
)
async def test_bad_requests(tmp_path: Path, body: dict[str, Any], status: int, code: str | None) -> None:
    async with adapter_world(tmp_path) as world:
        got, reply = await post(world, **body)
        assert (got, reply["error"]["code"]) == (status, code)


@pytest.mark.asyncio
async def test_full_host_memory_is_409(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        world.engine.kept.host.max_bytes = 10
        status, body = await post(world, name="sql", source=world.adapter("a"))
        assert (status, body["error"]["code"]) == (409, "adapter_capacity")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/adapters"),
        ("POST", "/v1/adapters"),
        ("GET", "/v1/adapters/x"),
        ("DELETE", "/v1/adapters/x"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ],
)
async def test_administration_needs_the_admin_key(tmp_path: Path, method: str, path: str) -> None:
    async with adapter_world(tmp_path, HTTPConfig(api_key="user", admin_api_key="admin")) as world:
        statuses = []
        for key in (None, "user", "admin"):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            reply = await world.client.request(method, path, headers=headers, json={} if method == "POST" else None)
            statuses.append(reply.status_code)
        assert statuses[:2] == [401, 403]
        assert statuses[2] not in (401, 403)
