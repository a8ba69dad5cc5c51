"""Adapters that bring a tokenizer, a chat template or a vocabulary of another size, over HTTP on a fake engine."""

from typing import Any

import httpx
import pytest

from adapters.adapter_facts import AdapterFacts
from adapters.adapter_ref import AdapterVersion
from tests.api.conftest import World, client_for, make_world
from tests.api.fakes import BASE
from tests.server.fakes import byte_level_tokenizer
from tests.server.test_adapter_tokenizer import files_with

pytestmark = pytest.mark.asyncio

SQL, CHAT = AdapterVersion("a" * 64), AdapterVersion("b" * 64)
NUM_BASE = 401
MARKED = "{% for m in messages %}<|tool|>{{ m['content'] }}{% endfor %}"


def with_tokenizer(**facts: Any) -> World:
    """`sql` brings a tokenizer of one more token, which ends its replies, and a template that uses it."""
    world = make_world()
    files = files_with("<|tool|>", config={"eos_token": "<|tool|>", "chat_template": MARKED})
    replaced = frozenset({"tokenizer", "vocabulary"})
    world.engine.facts[SQL] = AdapterFacts(**{"tokenizer_files": files, "replaced": replaced, **facts})
    return world


async def complete(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": "sql", "prompt": "x", "max_tokens": 2, **fields})


async def test_its_tokenizer_encodes_and_ends() -> None:
    world = with_tokenizer()
    async with client_for(world.app) as client:
        for model in ("sql", "sql@0.5", BASE, "team/chat"):
            assert (await complete(client, model=model, prompt="a<|tool|>")).status_code == 200
    own, weighted, base, other = world.engine.requests
    plain = byte_level_tokenizer()
    assert own.prompt_token_ids == weighted.prompt_token_ids == (*plain.encode("a"), NUM_BASE)
    assert base.prompt_token_ids == other.prompt_token_ids == tuple(plain.encode("a<|tool|>"))
    assert own.num_token_ids == weighted.num_token_ids == NUM_BASE + 1
    assert base.num_token_ids is other.num_token_ids is None
    assert own.stop_ids == {1, NUM_BASE} and base.stop_ids == {1}
    world.check_idle()


async def test_its_template_and_its_decoding() -> None:
    world = with_tokenizer()
    async with client_for(world.app) as client:
        for stream in (False, True):
            reply = await client.post(
                "/v1/chat/completions",
                json={
                    "model": "sql", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": stream,
                    "logprobs": True, "skip_special_tokens": False,
                },
            )  # fmt: skip
            assert reply.status_code == 200, reply.text
    for request in world.engine.requests:
        assert request.prompt_token_ids == (NUM_BASE, *byte_level_tokenizer().encode("hi"))
    world.check_idle()


async def test_text_of_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    world = with_tokenizer()
    monkeypatch.setattr(type(world.engine), "token_ids", lambda self, request: [NUM_BASE, NUM_BASE])
    async with client_for(world.app) as client:
        fields = {"skip_special_tokens": False, "ignore_eos": True, "logprobs": 1}
        own = (await complete(client, **fields)).json()["choices"][0]
        assert own["text"] == "<|tool|><|tool|>"
        assert own["logprobs"]["tokens"] == ["<|tool|>", "<|tool|>"]
        echoed = (await complete(client, prompt=[NUM_BASE], echo=True, **fields)).json()["choices"][0]
        assert echoed["text"] == "<|tool|>" * 3
        assert (await complete(client, ignore_eos=True)).json()["choices"][0]["text"] == ""
        parts = (await complete(client, stream=True, **fields)).text
        assert parts.count("<|tool|>") >= 2


async def test_ids_are_checked_against_the_requests_own_vocabulary() -> None:
    world = with_tokenizer()
    async with client_for(world.app) as client:
        for fields in ({"prompt": [NUM_BASE]}, {"stop_token_ids": [NUM_BASE]}, {"logit_bias": {str(NUM_BASE): 1}}):
            assert (await complete(client, **fields)).status_code == 200
            for model in (BASE, "team/chat"):
                reply = await complete(client, model=model, **fields)
                assert reply.status_code == 400 and "not below 401" in reply.json()["error"]["message"]
        reply = await complete(client, prompt=[NUM_BASE + 1])
        assert reply.status_code == 400 and "not below 402" in reply.json()["error"]["message"]
    world.check_idle()


async def test_a_smaller_vocabulary_refuses_prompts_past_it() -> None:
    world = make_world()
    world.engine.facts[SQL] = AdapterFacts(vocab_size=300)
    long_ids = [each for each in byte_level_tokenizer().encode("the stop stopping") if each >= 300]
    assert long_ids
    async with client_for(world.app) as client:
        assert (await complete(client, prompt="x")).status_code == 200
        reply = await complete(client, prompt="the stop stopping")
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "prompt"
        reply = await client.post(
            "/v1/chat/completions",
            json={"model": "sql", "messages": [{"role": "user", "content": "the stop stopping"}]},
        )
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "messages"
    assert [request.num_token_ids for request in world.engine.requests] == [300]
    world.check_idle()


@pytest.mark.parametrize(
    ("facts", "size"),
    [({}, 402), ({"vocab_size": 402}, 402), ({"vocab_size": 900}, 402), ({"vocab_size": 350}, 350)],
)
async def test_how_many_ids_there_are(facts: dict[str, Any], size: int) -> None:
    world = with_tokenizer(**facts)
    async with client_for(world.app) as client:
        assert (await complete(client, prompt=[5])).status_code == 200
    assert world.engine.requests[0].num_token_ids == size


async def test_a_tokenizer_and_another_adapter_without_one() -> None:
    world = with_tokenizer()
    async with client_for(world.app) as client:
        assert (await complete(client, model="team/chat@0.5+sql", prompt="<|tool|>")).status_code == 200
        files = files_with("<|other|>")
        world.engine.facts[CHAT] = AdapterFacts(tokenizer_files=files, replaced=frozenset({"tokenizer"}))
        reply = await complete(client, model="team/chat@0.5+sql")
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "adapter_conflict")
        files = dict(world.engine.facts[SQL].tokenizer_files)
        world.engine.facts[CHAT] = AdapterFacts(tokenizer_files=files, replaced=frozenset({"tokenizer"}))
        assert (await complete(client, model="team/chat@0.5+sql", prompt="<|tool|>")).status_code == 200
    assert [request.prompt_token_ids for request in world.engine.requests] == [(NUM_BASE,)] * 2


async def test_a_broken_tokenizer_is_told() -> None:
    world = make_world()
    world.engine.facts[SQL] = AdapterFacts(tokenizer_files={"tokenizer.json": b"{}"})
    async with client_for(world.app) as client:
        reply = await complete(client)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "tokenizer_not_loaded")
        assert (await complete(client, model="team/chat")).status_code == 200
    world.check_idle()
