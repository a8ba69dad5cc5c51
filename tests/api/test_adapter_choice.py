"""Every way to name adapters and weights: what the engine is asked for, what is echoed, and what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from adapters.adapter_facts import AdapterFacts
from adapters.adapter_ref import AdapterUse, AdapterVersion
from server.api.adapter_choice import AdapterFields, Reading, adapter_choice
from server.api.app import create_app
from server.config import HTTPConfig
from server.errors import BadRequest
from tests.api.conftest import LiveServer, World, client_for, make_world
from tests.api.fakes import BASE, adapter_ref

SQL, CHAT = AdapterVersion("a" * 64), AdapterVersion("b" * 64)
PATHS = ("/v1/completions", "/v1/chat/completions")


def body(path: str, **fields: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    return {"model": BASE, "max_tokens": 4, **asked, **fields}


FORMS: list[tuple[dict[str, Any], list[tuple[str, AdapterVersion, float]]]] = [
    ({"model": "sql@0.7"}, [("sql", SQL, 0.7)]),
    ({"model": f"{BASE}:sql@0.7"}, [("sql", SQL, 0.7)]),
    ({"model": f"{BASE}:sql@0.7+team/chat@0.3"}, [("sql", SQL, 0.7), ("team/chat", CHAT, 0.3)]),
    ({"model": "team/chat@0.3+sql@0.7"}, [("sql", SQL, 0.7), ("team/chat", CHAT, 0.3)]),
    ({"model": "sql+team/chat@-2"}, [("sql", SQL, 1.0), ("team/chat", CHAT, -2.0)]),
    ({"model": "sql@0.5+sql@0.25"}, [("sql", SQL, 0.75)]),
    ({"model": "sql@0.5+sql@-0.5"}, []),
    ({"model": "sql@0+team/chat"}, [("team/chat", CHAT, 1.0)]),
    ({"model": "sql@16"}, [("sql", SQL, 16.0)]),
    ({"adapters": [{"name": "sql"}]}, [("sql", SQL, 1.0)]),
    ({"adapters": [{"name": "team/chat", "weight": 0.3}, {"name": "sql", "weight": 2}]},
     [("sql", SQL, 2.0), ("team/chat", CHAT, 0.3)]),
    ({"adapters": [{"name": f"{BASE}:sql", "weight": -1}]}, [("sql", SQL, -1.0)]),
    ({"adapters": [{"name": "sql", "weight": 0}]}, []),
    ({"lora": [{"id": "sql", "scale": 0.7}]}, [("sql", SQL, 0.7)]),
    ({"lora": [{"id": 1, "scale": 0.7}, {"id": 0, "scale": 0.25}]}, [("sql", SQL, 0.7), ("team/chat", CHAT, 0.25)]),
]  # fmt: skip


def with_modules(world: World) -> World:
    """As a server that was started with --lora-modules team/chat=… sql=…"""
    config = replace(world.context.config, lora_modules=(("team/chat", Path("c")), ("sql", Path("s"))))
    context = replace(world.context, config=config)
    return replace(world, context=context, app=create_app(context))


@pytest.mark.asyncio
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("form", "expected"), FORMS, ids=lambda value: str(value)[:60])
async def test_forms(path: str, form: dict[str, Any], expected: list[tuple[str, AdapterVersion, float]]) -> None:
    world = with_modules(make_world())
    async with client_for(world.app) as client:
        reply = await client.post(path, json=body(path, **form))
    assert reply.status_code == 200, reply.text
    assert world.engine.requests[0].adapters == tuple(AdapterUse(version, weight) for _, version, weight in expected)
    echoed = [{"name": name, "version": version, "weight": weight} for name, version, weight in expected]
    assert reply.json()["adapters"] == echoed
    header = ", ".join(f"{name}={version};w={weight:g}" for name, version, weight in expected)
    assert reply.headers["x-loramux-adapters"] == header
    versions = [version for _, version, _ in expected]
    assert reply.headers.get("x-loramux-adapter-version") == (versions[0] if len(versions) == 1 else None)
    label = {0: BASE, 1: expected[0][0] if expected else "", 2: "(composed)"}[len(expected)]
    assert f'adapter="{label}"' in world.context.metrics.render().decode()
    world.check_idle()


@pytest.mark.asyncio
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("model", [BASE, "sql", f"{BASE}:sql"])
async def test_plain_names_are_answered_as_ever(client: httpx.AsyncClient, path: str, model: str) -> None:
    reply = await client.post(path, json=body(path, model=model))
    assert "adapters" not in reply.json() and "x-loramux-adapters" not in reply.headers


@pytest.mark.asyncio
@pytest.mark.parametrize("path", PATHS)
async def test_streams_echo_too(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.post(path, json=body(path, model="sql@0.5+team/chat", stream=True))
    chunks = [line for line in reply.text.splitlines() if line.startswith("data: {")]
    assert chunks and all(f'"version":"{SQL}","weight":0.5' in chunk for chunk in chunks)
    assert reply.headers["x-loramux-adapters"] == f"sql={SQL};w=0.5, team/chat={CHAT};w=1"


REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "sql@16.1"}, 400, None, "model"),
    ({"model": "sql@-17"}, 400, None, "model"),
    ({"model": "sql@9+sql@9"}, 400, None, "model"),
    ({"model": "sql+"}, 400, None, "model"),
    ({"model": "+sql"}, 400, None, "model"),
    ({"model": "sql++team/chat"}, 400, None, "model"),
    ({"model": f"{BASE}:+"}, 400, None, "model"),
    ({"model": "+".join(["sql@0.1"] * 9)}, 400, None, "model"),
    ({"model": f"{BASE}+sql"}, 400, None, "model"),
    ({"model": f"{BASE}@0.5"}, 400, None, "model"),
    ({"model": "sql+nobody"}, 404, "model_not_found", "model"),
    ({"model": "nobody@0.5"}, 404, "model_not_found", "model"),
    ({"model": "sql@"}, 404, "model_not_found", "model"),
    ({"model": "sql@nan"}, 404, "model_not_found", "model"),
    ({"model": "sql@1e1"}, 404, "model_not_found", "model"),
    ({"model": "sql@0.1234567"}, 404, "model_not_found", "model"),
    ({"model": "sql@٣"}, 404, "model_not_found", "model"),
    ({"model": "sql", "adapters": [{"name": "sql"}]}, 400, None, "model"),
    ({"model": "sql@0.5", "adapters": [{"name": "sql"}]}, 404, "model_not_found", "model"),
    ({"model": "nobody", "adapters": [{"name": "sql"}]}, 404, "model_not_found", "model"),
    ({"adapters": [{"name": "sql"}, {"name": "nobody"}]}, 404, "model_not_found", "model"),
    ({"adapters": [{"name": "sql@0.5"}]}, 404, "model_not_found", "model"),
    ({"adapters": [{"name": "sql", "weight": 10}, {"name": "sql", "weight": 10}]}, 400, None, "model"),
    ({"adapters": [{"name": "sql"}], "lora": [{"id": "sql", "scale": 1}]}, 400, None, "lora"),
    ({"lora": [{"id": 2, "scale": 1}]}, 400, None, "lora"),
    ({"adapter_id": "sql"}, 400, None, "adapter_id"),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("form", "status", "code", "param"), REFUSED, ids=lambda value: str(value)[:50])
async def test_malformed_forms(path: str, form: dict[str, Any], status: int, code: str | None, param: str) -> None:
    world = with_modules(make_world())
    async with client_for(world.app) as client:
        reply = await client.post(path, json=body(path, **form))
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
    assert error["type"] == "invalid_request_error"
    assert world.engine.requests == []
    world.check_idle()


@pytest.mark.asyncio
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("left", "right", "named"),
    [
        ({"model.norm.weight", "lm_head"}, {"model.norm.weight"}, "'model.norm.weight'"),
        ({"model.embed_tokens"}, {"model.embed_tokens[17]"}, "'model.embed_tokens[17]'"),
        ({"model.embed_tokens[3]", "x"}, {"model.embed_tokens"}, "'model.embed_tokens[3]'"),
        ({"vocabulary", "b"}, {"b", "vocabulary"}, "'b', 'vocabulary'"),
        ({f"e[{at}]" for at in range(9)}, {"e"}, "'e[0]', 'e[1]', 'e[2]' and 6 more"),
    ],
)
async def test_conflicts_are_409_before_admission(path: str, left: set[str], right: set[str], named: str) -> None:
    world = make_world()
    world.engine.facts[SQL] = AdapterFacts(replaced=frozenset(left))
    world.engine.facts[CHAT] = AdapterFacts(replaced=frozenset(right))
    async with client_for(world.app) as client:
        reply = await client.post(path, json=body(path, model="sql@0.5+team/chat"))
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["type"]) == (409, "adapter_conflict", "invalid_request_error")
        assert f"'sql' and 'team/chat' both replace {named} of the base model" in error["message"]
        assert world.engine.requests == []
        for alone in ("sql@0.5", "team/chat", "sql+team/chat@0"):
            assert (await client.post(path, json=body(path, model=alone))).status_code == 200
    world.check_idle()


@pytest.mark.asyncio
async def test_rows_of_one_embedding_do_not_conflict_unless_they_are_the_same() -> None:
    world = make_world()
    world.engine.facts[SQL] = AdapterFacts(replaced=frozenset({"e[1]", "e[2]"}))
    world.engine.facts[CHAT] = AdapterFacts(replaced=frozenset({"e[3]", "e2", "a.e"}))
    async with client_for(world.app) as client:
        assert (await client.post(PATHS[0], json=body(PATHS[0], model="sql+team/chat"))).status_code == 200


@pytest.mark.asyncio
async def test_an_invocation_decides_from_where_an_adapter_acts() -> None:
    world = make_world()
    world.engine.facts[SQL] = AdapterFacts(invocation_tokens=(7, 8))
    prompts = [[7, 8, 5, 7, 8, 9], [7, 8], [5, 7], [8, 7, 5], [5, 7, 8]]
    async with client_for(world.app) as client:
        reply = await client.post(PATHS[0], json={"model": "sql@0.5+team/chat", "prompt": prompts, "max_tokens": 1})
    assert reply.status_code == 200
    always = AdapterUse(CHAT)
    assert [request.adapters for request in world.engine.requests] == [
        (AdapterUse(SQL, 0.5, 3), always),
        (AdapterUse(SQL, 0.5, 0), always),
        (always,),
        (always,),
        (AdapterUse(SQL, 0.5, 1), always),
    ]
    world.check_idle()


def test_names_with_a_plus_belong_to_the_base() -> None:
    def parts(model: str) -> list[list[Reading]]:
        choice = adapter_choice(AdapterFields(model=model), bases=("a+b", "a"))
        return [list(readings) for readings in choice.parts]

    assert parts("a+b") == [[Reading("a+b")]]
    assert parts("a+b:sql@0.5") == [[Reading("a+b:sql@0.5"), Reading("a+b:sql", 0.5)]]
    assert parts("a+b:sql+tone") == [[Reading("a+b:sql")], [Reading("tone")]]
    assert parts("a:sql+tone") == [[Reading("a:sql")], [Reading("tone")]]
    with pytest.raises(BadRequest):
        parts("a+b:+tone")


# The official client.


@pytest.fixture
def sdk(live: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="anything", max_retries=0) as client:
        yield client


def test_the_sdk_names_several(sdk: OpenAI, live: LiveServer) -> None:
    named = {"adapters": [{"name": "sql", "weight": 0.7}, {"name": "team/chat", "weight": 0.3}]}
    reply = sdk.chat.completions.with_raw_response.create(
        model=BASE, messages=[{"role": "user", "content": "Hi"}], extra_body=named
    )
    assert reply.headers["x-loramux-adapters"] == f"sql={SQL};w=0.7, team/chat={CHAT};w=0.3"
    assert reply.parse().model_extra == {
        "adapters": [
            {"name": "sql", "version": SQL, "weight": 0.7},
            {"name": "team/chat", "version": CHAT, "weight": 0.3},
        ]
    }
    by_model = sdk.completions.create(model=f"{BASE}:sql@0.7+team/chat@0.3", prompt="Hi", max_tokens=2)
    assert by_model.model_extra is not None and by_model.model_extra["adapters"][1]["weight"] == 0.3
    first, second = (request.adapters for request in live.world.engine.requests)
    assert first == second == (AdapterUse(SQL, 0.7), AdapterUse(CHAT, 0.3))


def test_the_sdk_raises_conflicts(sdk: OpenAI, live: LiveServer) -> None:
    live.world.engine.facts[SQL] = live.world.engine.facts[CHAT] = AdapterFacts(replaced=frozenset({"norm.weight"}))
    with pytest.raises(openai.ConflictError) as refused:
        sdk.completions.create(model="sql+team/chat", prompt="Hi")
    assert refused.value.code == "adapter_conflict"


@pytest.mark.asyncio
async def test_names_that_hold_an_at_come_before_weights() -> None:
    """`sql@2` may be an adapter's name; while it is one, 2 is no weight."""
    world = make_world(HTTPConfig())
    ref = adapter_ref("sql@2", "c")
    world.engine.texts[ref.version] = "two"
    world.adapters.refs = {**world.adapters.refs, "sql@2": ref}
    async with client_for(world.app) as client:
        reply = await client.post(PATHS[0], json=body(PATHS[0], model="sql@2+sql@2@0.5+sql@3"))
    assert reply.json()["adapters"] == [
        {"name": "sql", "version": SQL, "weight": 3.0},
        {"name": "sql@2", "version": ref.version, "weight": 1.5},
    ]
