"""/v1/aliases, and everything that `model` may say: names, versions, aliases, any of them behind a base's name."""

from pathlib import Path
from typing import Any

import pytest

from tests.api.adapter_world import BASES, AdapterWorld, adapter_world
from tests.api.test_adapter_life import load

pytestmark = pytest.mark.asyncio

HEADER = "x-loramux-adapter-version"
PATHS = ("/v1/completions", "/v1/chat/completions")


async def two(world: AdapterWorld) -> tuple[str, str]:
    """The versions of sql and of chat."""
    versions = [
        (await load(world, name, world.adapter(name, at)))["version"] for at, name in enumerate(("sql", "chat"))
    ]
    return versions[0], versions[1]


async def put(world: AdapterWorld, name: str, **weights: float) -> dict[str, Any]:
    targets = [{"adapter": adapter, "weight": weight} for adapter, weight in weights.items()]
    reply = await world.client.put(f"/v1/aliases/{name}", json={"targets": targets})
    assert reply.status_code == 200, reply.text
    described: dict[str, Any] = reply.json()
    return described


async def version_of(world: AdapterWorld, model: str, path: str = PATHS[0], **body: Any) -> str | None:
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    reply = await world.client.post(path, json={"model": model, "max_tokens": 1, **prompt, **body})
    assert reply.status_code == 200, reply.text
    return reply.headers.get(HEADER)


async def test_made_listed_moved_rolled_back_removed(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        sql, chat = await two(world)
        assert (await world.client.get("/v1/aliases")).json() == {"object": "list", "data": []}
        first = await put(world, "org/best", sql=1)
        assert first == {
            "object": "alias",
            "name": "org/best",
            "targets": [{"adapter": "sql", "version": None, "weight": 1.0}],
            "managed_by": "api",
        }
        assert await version_of(world, "org/best") == sql
        assert await put(world, "org/best", sql=1) == first
        moved = await put(world, "org/best", chat=1)
        assert await version_of(world, "org/best") == chat
        assert (await world.client.get("/v1/aliases/org/best")).json() == moved
        assert (await world.client.get("/v1/aliases")).json()["data"] == [moved]
        assert (await world.client.post("/v1/aliases/org/best/rollback")).json() == first
        assert await version_of(world, "org/best") == sql
        gone = await world.client.delete("/v1/aliases/org/best")
        assert gone.json() == {"object": "alias", "name": "org/best", "deleted": True}
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/rollback")):
            status, error = await world.refused(method, f"/v1/aliases/org/best{path}")
            assert (status, error["code"]) == (404, "alias_not_found")


@pytest.mark.parametrize("path", PATHS)
async def test_every_way_to_name_a_version(tmp_path: Path, path: str) -> None:
    async with adapter_world(tmp_path) as world:
        old = (await load(world, "sql", world.adapter("a")))["version"]
        new = (await load(world, "sql", world.adapter("b", 1), load_inplace=True))["version"]
        targets = {"targets": [{"adapter": f"sql@{old[:8]}", "weight": 1}]}
        assert (await world.client.put("/v1/aliases/old", json=targets)).json()["targets"][0]["version"] == old
        expected = {"sql": new, f"sql@{old}": old, f"sql@{old[:8]}": old, f"sql@{new[:12]}": new, "old": old}
        for model, version in expected.items():
            for text in (model, *(f"{base}:{model}" for base in BASES)):
                assert await version_of(world, text, path) == version, text
                reply = await world.client.get(f"/v1/models/{text}")
                assert reply.json()["id"] == ("old" if model == "old" else "sql"), text
        assert await version_of(world, BASES[0], path) is None
        for model in (f"sql@{old[:7]}", "sql@", "sql@zzzzzzzz", f"chat@{old}", f"old@{old}", "sql@" + "0" * 64):
            body = {"model": model, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
            body.pop("prompt" if "chat" in path else "messages")
            status, error = await world.refused("POST", path, json=body)
            assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["user", "safety_identifier", "seed"])
async def test_the_same_key_gets_the_same_adapter(tmp_path: Path, path: str, field: str) -> None:
    async with adapter_world(tmp_path) as world:
        both = set(await two(world))
        await put(world, "ab", sql=50, chat=50)
        keys: list[Any] = list(range(24)) if field == "seed" else [f"u{at}" for at in range(24)]
        firsts = [await version_of(world, "ab", path, **{field: key}) for key in keys]
        assert set(firsts) == both
        assert [await version_of(world, "ab", path, **{field: key}) for key in keys] == firsts
        assert [await version_of(world, f"{BASES[0]}:ab", path, **{field: key}) for key in keys] == firsts


async def test_the_safety_identifier_counts_before_the_user_and_the_user_before_the_seed(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await two(world)
        await put(world, "ab", sql=50, chat=50)
        for at in range(12):
            one = await version_of(world, "ab", safety_identifier=f"s{at}")
            assert await version_of(world, "ab", safety_identifier=f"s{at}", user="other", seed=at) == one
            two_ = await version_of(world, "ab", user=f"u{at}")
            assert await version_of(world, "ab", user=f"u{at}", seed=at + 100) == two_


async def test_a_weight_of_zero_gets_nobody(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        _, chat = await two(world)
        await put(world, "ab", sql=0, chat=1e-3)
        assert {await version_of(world, "ab", seed=at) for at in range(20)} == {chat}
        assert {await version_of(world, "ab") for _ in range(20)} == {chat}


@pytest.mark.parametrize(
    ("targets", "param", "code"),
    [
        ([], "targets", None),
        ([{"adapter": "sql"}] * 17, "targets", None),
        ("sql", "targets", None),
        ([{"weight": 1}], "targets.0.adapter", None),
        ([{"adapter": ""}], "targets.0.adapter", None),
        ([{"adapter": "x" * 513}], "targets.0.adapter", None),
        ([{"adapter": "sql", "weight": -0.1}], "targets.0.weight", None),
        ([{"adapter": "sql", "weight": 1e7}], "targets.0.weight", None),
        ([{"adapter": "sql", "weight": "1"}], "targets.0.weight", None),
        ([{"adapter": "sql", "weight": True}], "targets.0.weight", None),
        ([{"adapter": "sql", "weight": 0}, {"adapter": "chat", "weight": 0}], None, "adapter_name_invalid"),
        ([{"adapter": "nobody"}], None, "adapter_not_found"),
        ([{"adapter": "sq\0l"}], None, "adapter_not_found"),
        ([{"adapter": "sql@00000000"}], None, "adapter_not_found"),
        ([{"adapter": "org/base"}], None, "adapter_not_found"),
    ],
)
async def test_targets_have_bounds(tmp_path: Path, targets: Any, param: str | None, code: str | None) -> None:
    async with adapter_world(tmp_path) as world:
        await two(world)
        status, error = await world.refused("PUT", "/v1/aliases/ab", json={"targets": targets})
        assert (status, error["param"], error["code"]) == (404 if code == "adapter_not_found" else 400, param, code)
        assert "\0" not in error["message"]
        assert not world.service.directory.aliases


async def test_an_alias_may_have_sixteen_targets(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await two(world)
        targets = {"targets": [{"adapter": "sql"}] * 16}
        assert (await world.client.put("/v1/aliases/ab", json=targets)).status_code == 200


async def test_adapters_and_aliases_share_their_names(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await two(world)
        target = {"targets": [{"adapter": "sql"}]}
        await put(world, "best", sql=1)
        for name, status, code in (
            ("chat", 409, "adapter_conflict"), ("org/base", 400, "adapter_name_invalid"),
            ("a%00b", 400, "adapter_name_invalid"), ("%D1%81", 400, "adapter_name_invalid"),
        ):  # fmt: skip
            got, error = await world.refused("PUT", f"/v1/aliases/{name}", json=target)
            assert (got, error["code"]) == (status, code)
        source = world.adapter("c", 2)
        for path, body in (
            ("/v1/adapters", {"name": "best", "source": source}),
            ("/v1/adapters/best/validate", {"source": source}),
        ):
            got, error = await world.refused("POST", path, json=body)
            assert (got, error["code"]) == (409, "adapter_conflict")
        got, error = await world.refused("DELETE", "/v1/adapters/sql")
        assert (got, error["code"]) == (409, "adapter_conflict") and "best" in error["message"]
        reply = await world.client.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
        assert reply.status_code == 409
        assert reply.json()["message"] == reply.json()["error"]["message"]
        assert (await world.client.get("/v1/adapters/sql")).status_code == 200


async def test_models_lists_aliases(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await two(world)
        await put(world, "ab", sql=90, chat=10)
        cards = (await world.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == [*BASES, "chat", "sql", "ab"]
        assert (cards[-1]["root"], cards[-1]["parent"]) == ("sql,chat", BASES[0])
        assert (await world.client.get("/v1/models/ab")).json() == cards[-1]
        assert (await world.client.get(f"/v1/models/{BASES[1]}:ab")).json() == cards[-1]
