"""The official client against a real socket: what it reads, and which of its exceptions each status becomes."""

from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from server.engine.request import FinishReason
from server.errors import QueueFull, Unavailable
from tests.api.conftest import SQL_TEXT, LiveServer, make_world, serve, with_keys
from tests.api.fakes import BASE, REPLY


@pytest.fixture
def sdk(live: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="anything", max_retries=0) as client:
        yield client


def test_chat(sdk: OpenAI) -> None:
    reply = sdk.chat.completions.create(
        model="sql", messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=3, n=2
    )
    assert [choice.message.content for choice in reply.choices] == [SQL_TEXT] * 2
    assert reply.model == "sql"
    assert reply._request_id
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.content is not None
    assert len(reply.choices[0].logprobs.content[0].top_logprobs) == 3


def test_chat_streamed(sdk: OpenAI) -> None:
    stream = sdk.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
        stop="lazy",
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The quick brown fox jumps over the "
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens > 0


def test_the_sdks_own_stream_helper(sdk: OpenAI) -> None:
    with sdk.chat.completions.stream(model=BASE, messages=[{"role": "user", "content": "Hi"}]) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == REPLY


def test_completions(sdk: OpenAI) -> None:
    reply = sdk.completions.create(model=BASE, prompt=["a", "b"], max_tokens=64, logprobs=2, echo=True)
    assert [choice.text for choice in reply.choices] == ["a" + REPLY, "b" + REPLY]
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.text_offset is not None
    chunks = sdk.completions.create(model=BASE, prompt=[5, 6, 7], max_tokens=64, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == REPLY


@pytest.mark.asyncio
async def test_the_asynchronous_client(live: LiveServer) -> None:
    async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="anything", max_retries=0) as sdk:
        reply = await sdk.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "Hi"}])
        assert reply.choices[0].message.content == REPLY
        stream = await sdk.completions.create(model="team/chat", prompt="x", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "stop stopping END"


def ask(sdk: OpenAI, model: str = BASE, max_tokens: int = 5) -> None:
    sdk.completions.create(model=model, prompt="x", max_tokens=max_tokens)


def test_each_status_is_the_exception_it_should_be(sdk: OpenAI, live: LiveServer) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        ask(sdk, model="nope")
    assert not_found.value.code == "model_not_found"
    assert not_found.value.param == "model"
    assert "nope" in not_found.value.message
    with pytest.raises(openai.BadRequestError) as too_long:
        ask(sdk, max_tokens=5000)
    assert too_long.value.code == "context_length_exceeded"
    live.world.engine.refuse = QueueFull("full")
    with pytest.raises(openai.RateLimitError) as full:
        ask(sdk)
    assert full.value.code == "rate_limit_exceeded"
    assert full.value.response.headers["retry-after"] == "1"
    live.world.engine.refuse = Unavailable("draining")
    with pytest.raises(openai.InternalServerError) as draining:
        ask(sdk)
    assert draining.value.status_code == 503
    live.world.engine.refuse = None
    live.world.engine.end_with = (FinishReason.ERROR, 1)
    with pytest.raises(openai.InternalServerError) as failed:
        ask(sdk)
    assert failed.value.code == "engine_error"


def test_a_failed_stream_raises(sdk: OpenAI, live: LiveServer) -> None:
    live.world.engine.end_with = (FinishReason.ERROR, 3)
    texts = []
    with pytest.raises(openai.APIError, match="engine failed"):
        for chunk in sdk.completions.create(model=BASE, prompt="x", stream=True):
            texts.append(chunk.choices[0].text)
    assert texts


def test_a_full_queue_is_retried_and_an_engine_error_is_not(live: LiveServer) -> None:
    live.world.engine.end_with = (FinishReason.ERROR, 0)
    with OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=2) as sdk, pytest.raises(openai.APIError):
        ask(sdk)
    assert len(live.world.engine.streams) == 1


def test_keys() -> None:
    world = make_world(with_keys(api_key="right", admin_api_key="root"))
    with serve(world) as live, OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0) as sdk:
        with pytest.raises(openai.AuthenticationError) as refused:
            ask(sdk)
        assert refused.value.code == "invalid_api_key"
        ask(sdk.with_options(api_key="right"))
        ask(sdk.with_options(api_key="root"))
        with pytest.raises(openai.PermissionDeniedError):
            sdk.with_options(api_key="right").post("/load_lora_adapter", cast_to=object, body={})
