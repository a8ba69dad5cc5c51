"""POST /v1/completions over ASGI."""

from typing import Any

import httpx
import pytest

from server.engine.request import FinishReason
from server.errors import QueueFull, Unavailable
from tests.api.conftest import SQL_TEXT, World
from tests.api.fakes import BASE, REPLY
from tests.server.fakes import byte_level_tokenizer

pytestmark = pytest.mark.asyncio

TOKENIZER = byte_level_tokenizer()


async def complete(client: httpx.AsyncClient, status: int = 200, **fields: Any) -> Any:
    body = {"model": BASE, "prompt": "the fox", "max_tokens": 64} | fields
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == status, response.text
    return response.json()


async def test_a_reply_has_openais_shape(client: httpx.AsyncClient, world: World) -> None:
    world.engine.num_cached_tokens = 2
    reply = await complete(client)
    num_prompt, num_reply = len(TOKENIZER.encode("the fox")), len(TOKENIZER.encode(REPLY)) + 1
    assert reply["object"] == "text_completion"
    assert reply["id"].startswith("cmpl-")
    assert reply["model"] == BASE
    assert reply["choices"] == [{"index": 0, "text": REPLY, "logprobs": None, "finish_reason": "stop"}]
    assert reply["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_reply,
        "total_tokens": num_prompt + num_reply,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [
        ("the fox", 1),
        (["the fox", "stop"], 2),
        (TOKENIZER.encode("the fox"), 1),
        ([TOKENIZER.encode("the fox"), [5, 6, 7]], 2),
    ],
    ids=["string", "strings", "ids", "lists of ids"],
)
async def test_the_four_forms_of_a_prompt(
    client: httpx.AsyncClient, world: World, prompt: Any, num_prompts: int
) -> None:
    reply = await complete(client, prompt=prompt)
    assert len(reply["choices"]) == len(world.engine.requests) == num_prompts
    assert world.engine.requests[0].prompt_token_ids == tuple(TOKENIZER.encode("the fox"))


async def test_n_choices_of_each_prompt_come_in_order(client: httpx.AsyncClient, world: World) -> None:
    reply = await complete(client, prompt=["a", "b"], n=3, seed=7)
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    prompts = [request.prompt_token_ids for request in world.engine.requests]
    assert prompts[0] == prompts[1] == prompts[2] != prompts[3]
    seeds = [request.sampling_params.seed for request in world.engine.requests]
    assert len(set(seeds[:3])) == 3
    assert seeds[:3] == seeds[3:]
    assert reply["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[3])


async def test_a_seed_means_the_same_whatever_n_is(client: httpx.AsyncClient, world: World) -> None:
    await complete(client, seed=-5)
    await complete(client, seed=-5, n=2)
    await complete(client)
    await complete(client)
    seeds = [request.sampling_params.seed for request in world.engine.requests]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_an_adapter_answers_by_its_name_and_by_base_and_name(client: httpx.AsyncClient, world: World) -> None:
    for model in ("sql", f"{BASE}:sql"):
        response = await client.post("/v1/completions", json={"model": model, "prompt": "x"})
        assert response.json()["choices"][0]["text"] == SQL_TEXT[: len(response.json()["choices"][0]["text"])]
        assert response.json()["model"] == model
        assert response.headers["x-loramux-adapter-version"] == "a" * 64
    assert world.adapters.num_acquired == 2
    assert [request.adapters[0].version for request in world.engine.requests] == ["a" * 64] * 2


async def test_an_unknown_model_is_never_the_base(client: httpx.AsyncClient, world: World) -> None:
    for model in ("nope", f"{BASE}:nope", "sql2"):
        error = (await complete(client, 404, model=model))["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert world.engine.requests == []


async def test_echo_repeats_the_prompt(client: httpx.AsyncClient) -> None:
    reply = await complete(client, echo=True, n=2)
    assert [choice["text"] for choice in reply["choices"]] == ["the fox" + REPLY] * 2
    ids = TOKENIZER.encode("the fox")
    assert (await complete(client, echo=True, prompt=ids, max_tokens=0))["choices"][0]["text"] == "the fox"


async def test_echo_with_logprobs_scores_the_prompt(client: httpx.AsyncClient, world: World) -> None:
    """What lm-eval's local-completions sends: token ids, echo, logprobs 1, max_tokens 0 or 1."""
    ids = [*TOKENIZER.encode("the quick"), 100, 101]
    for max_tokens in (0, 1):
        choice = (await complete(client, prompt=[ids], echo=True, logprobs=1, max_tokens=max_tokens))["choices"][0]
        logprobs = choice["logprobs"]
        assert {len(each) for each in logprobs.values()} == {len(ids) + max_tokens}
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        for at in range(1, len(ids)):
            label, top = logprobs["tokens"][at], logprobs["top_logprobs"][at]
            assert top[label] == logprobs["token_logprobs"][at]
            assert (max(top.values()) == top[label]) == (ids[at] % 2 == 0)
        assert choice["finish_reason"] == "length"
    assert world.engine.requests[0].sampling_params.prompt_logprobs == 1


async def test_text_offsets_are_places_in_the_text(client: httpx.AsyncClient, world: World) -> None:
    world.engine.texts[None] = "naïve 日本語 👩 end"
    choice = (await complete(client, echo=True, logprobs=0, prompt="café ", max_tokens=60))["choices"][0]
    logprobs = choice["logprobs"]
    for label, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not label.startswith("bytes:") and label != "<|end|>":
            assert choice["text"][offset : offset + len(label)] == label
    assert any(label.startswith("bytes:\\x") for label in logprobs["tokens"])


async def test_logprobs_of_twenty(client: httpx.AsyncClient) -> None:
    logprobs = (await complete(client, logprobs=20, max_tokens=3))["choices"][0]["logprobs"]
    assert len(logprobs["top_logprobs"]) == 3
    assert all(19 <= len(top) <= 21 for top in logprobs["top_logprobs"])


async def test_max_tokens_defaults_to_sixteen_or_the_room_there_is(client: httpx.AsyncClient, world: World) -> None:
    await client.post("/v1/completions", json={"model": BASE, "prompt": "a"})
    await client.post("/v1/completions", json={"model": BASE, "prompt": [5] * 250})
    assert [request.sampling_params.max_tokens for request in world.engine.requests] == [16, 6]


async def test_a_stop_string_ends_the_text_before_it(client: httpx.AsyncClient, world: World) -> None:
    choice = (await complete(client, stop=["own f", "lazy"]))["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("The quick br", "stop")
    assert world.engine.streams[0].is_aborted
    choice = (await complete(client, stop="own f", include_stop_str_in_output=True))["choices"][0]
    assert choice["text"] == "The quick brown f"


async def test_usage_counts_no_token_past_the_stop_string(client: httpx.AsyncClient, world: World) -> None:
    reply = await complete(client, stop="quick", logprobs=0, return_token_ids=True)
    choice = reply["choices"][0]
    assert reply["usage"]["completion_tokens"] == len(choice["token_ids"]) == len(choice["logprobs"]["tokens"])
    assert TOKENIZER.decode(choice["token_ids"]).startswith("The quick")
    assert choice["prompt_token_ids"] == TOKENIZER.encode("the fox")


async def test_a_stop_token_ends_and_is_not_text(client: httpx.AsyncClient, world: World) -> None:
    first, *_, stop = TOKENIZER.encode("The quick")
    choice = (await complete(client, stop_token_ids=[stop], ignore_eos=True))["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "The quick".startswith(choice["text"]) and choice["text"] != "The quick"
    assert world.engine.requests[0].stop_ids == {stop}


async def test_ignore_eos_runs_to_the_length(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, ignore_eos=True, max_tokens=60))["choices"][0]
    assert choice["finish_reason"] == "length"


async def test_every_sampling_field_reaches_the_engine(client: httpx.AsyncClient, world: World) -> None:
    asked = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1.5, "frequency_penalty": -1,
        "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [9], "logprobs": 3,
    }  # fmt: skip
    await complete(client, logit_bias={"12": -100, "13": 5.5}, **asked)
    params = world.engine.requests[0].sampling_params
    assert {name: getattr(params, name) for name in asked} == asked | {"stop_token_ids": (9,)}
    assert params.logit_bias == {12: -100.0, 13: 5.5}
    await complete(client, top_k=-1, top_p=0)
    assert world.engine.requests[1].sampling_params.top_k is None
    assert 0 < world.engine.requests[1].sampling_params.top_p < 1e-5


async def test_null_and_empty_optionals_count_as_absent(client: httpx.AsyncClient, world: World) -> None:
    names = "temperature top_p n stop seed logprobs echo stream stream_options best_of tools"
    nulls = dict.fromkeys(names.split())
    await complete(client, **nulls, suffix="", logit_bias={}, stop_token_ids=[], something_else={"a": 1})
    assert world.engine.requests[0].sampling_params.temperature == 1.0


@pytest.mark.parametrize(("error", "status"), [(QueueFull("full"), 429), (Unavailable("draining"), 503)])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_admission_keeps_its_status(
    client: httpx.AsyncClient, world: World, error: Any, status: int, stream: bool
) -> None:
    world.engine.refuse = error
    response = await client.post("/v1/completions", json={"model": "sql", "prompt": "x", "stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["code"] == error.code
    assert 1 <= int(response.headers["retry-after"]) <= 120
    assert world.adapters.open_leases == []


async def test_an_engine_failure_is_a_500_without_its_cause(client: httpx.AsyncClient, world: World) -> None:
    world.engine.end_with = (FinishReason.ERROR, 2)
    response = await client.post("/v1/completions", json={"model": "sql", "prompt": "x", "n": 4})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_error"
    assert response.headers["x-should-retry"] == "false"
    assert "secret" not in response.text and "0x" not in response.text


async def test_an_abort_by_shutdown_is_a_503(client: httpx.AsyncClient, world: World) -> None:
    world.engine.end_with = (FinishReason.ABORT, 2)
    error = (await complete(client, 503))["error"]
    assert error["code"] == "server_unavailable"


async def test_metrics_see_each_choice_end(client: httpx.AsyncClient, world: World) -> None:
    await complete(client, n=2)
    await complete(client, stop="quick")
    rendered = world.context.metrics.render().decode()
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 3.0' in rendered


async def test_min_tokens_hold_stop_strings_back(client: httpx.AsyncClient, world: World) -> None:
    num_tokens = len(world.engine.tokenizer.encode("The quick brown"))
    for min_tokens, text in ((0, "The quick br"), (num_tokens, "The quick brown f")):
        body = await complete(client, stop="o", min_tokens=min_tokens)
        assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == (text, "stop")
