"""POST /v1/chat/completions over ASGI."""

from typing import Any

import httpx
import pytest

from tests.api.conftest import World
from tests.api.fakes import BASE, REPLY
from tests.server.fakes import byte_level_tokenizer

pytestmark = pytest.mark.asyncio

TOKENIZER = byte_level_tokenizer()
HELLO = [{"role": "user", "content": "Hello"}]


async def chat(client: httpx.AsyncClient, status: int = 200, **fields: Any) -> Any:
    response = await client.post("/v1/chat/completions", json={"model": BASE, "messages": HELLO} | fields)
    assert response.status_code == status, response.text
    return response.json()


async def test_a_reply_has_openais_shape(client: httpx.AsyncClient) -> None:
    reply = await chat(client)
    assert reply["object"] == "chat.completion"
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLY, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert reply["system_fingerprint"].startswith("fp_")


async def test_messages_go_through_the_template(client: httpx.AsyncClient, world: World) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "x", "name": "Bob"},
    ]
    await chat(client, messages=messages, chat_template_kwargs={"shout": True})
    prompt = TOKENIZER.decode(world.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\none\ntwo<|end|>\n<|start|>assistant\n<|end|>\n"
        "<|start|>user\nx<|end|>\n!<|start|>assistant\n"
    )


async def test_the_last_message_may_be_continued(client: httpx.AsyncClient, world: World) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well, I"}]
    await chat(client, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert TOKENIZER.decode(world.engine.requests[0].prompt_token_ids, skip_special_tokens=False).endswith("Well, I")
    error = (await chat(client, 400, messages=messages, continue_final_message=True))["error"]
    assert error["param"] == "continue_final_message"


async def test_max_tokens_reaches_to_the_models_length(client: httpx.AsyncClient, world: World) -> None:
    await chat(client)
    await chat(client, max_tokens=5)
    await chat(client, max_tokens=5, max_completion_tokens=7)
    room = 256 - len(world.engine.requests[0].prompt_token_ids)
    assert [request.sampling_params.max_tokens for request in world.engine.requests] == [room, 5, 7]


async def test_logprobs_carry_exact_bytes(client: httpx.AsyncClient, world: World) -> None:
    world.engine.texts[None] = "日本語 👩"
    choice = (await chat(client, logprobs=True, top_logprobs=2))["choices"][0]
    content = choice["logprobs"]["content"]
    assert bytes(sum((each["bytes"] for each in content[:-1]), [])).decode() == "日本語 👩"
    assert all(len(each["top_logprobs"]) == 2 for each in content)
    assert all(set(each) == {"token", "logprob", "bytes", "top_logprobs"} for each in content)


async def test_logprobs_without_alternatives(client: httpx.AsyncClient) -> None:
    content = (await chat(client, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert all(each["top_logprobs"] == [] for each in content)


async def test_top_logprobs_needs_logprobs(client: httpx.AsyncClient) -> None:
    assert (await chat(client, 400, top_logprobs=2))["error"]["param"] == "top_logprobs"


async def test_choices_differ_in_index_and_seed(client: httpx.AsyncClient, world: World) -> None:
    reply = await chat(client, n=3, model="team/chat")
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["stop stopping END"] * 3
    assert len({request.sampling_params.seed for request in world.engine.requests}) == 3


async def test_a_prompt_past_the_context_names_both_numbers(client: httpx.AsyncClient, world: World) -> None:
    error = (await chat(client, 400, messages=[{"role": "user", "content": "日本語 " * 400}]))["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 256 tokens" in error["message"]
    error = (await chat(client, 400, max_tokens=250))["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "250 in max_tokens" in error["message"]
    assert world.engine.requests == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "schema": {}}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
        ("reasoning_effort", "high"),
        ("functions", [{"name": "f"}]),
        ("prompt_logprobs", 1),
        ("adapter_id", "sql"),
        ("lora", [{"id": 0, "scale": 1.0}]),
        ("echo", True),
        ("use_beam_search", 0),
        ("guided_json", {}),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    client: httpx.AsyncClient, world: World, field: str, value: Any
) -> None:
    error = (await chat(client, 400, **{field: value}))["error"]
    assert error["param"] == field
    assert f"'{field}'" in error["message"]
    assert world.engine.requests == []


async def test_neutral_values_are_accepted(client: httpx.AsyncClient) -> None:
    await chat(
        client,
        tools=[], tool_choice="auto", parallel_tool_calls=False, response_format={"type": "text"}, modalities=["text"],
        audio=None, service_tier="auto", store=True, metadata={"a": "b"}, user="u", reasoning_effort="none",
        prediction=None, use_beam_search=False, echo=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content.0.type"),
        ({"role": "robot", "content": "x"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": 3}, "messages.0.content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages"),
    ],
)
async def test_messages_that_cannot_be_taken(client: httpx.AsyncClient, message: Any, param: str) -> None:
    error = (await chat(client, 400, messages=[message]))["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
