"""Weights and several adapters at once, over HTTP by the official client, to PEFT's numbers."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from safetensors.torch import load_file, save_file

from server.config import MIB, CacheConfig, EngineConfig, HTTPConfig, LoRALimits, ModelConfig, ServerConfig
from tests.end_to_end.in_process import InProcessServer, free_port, in_process, save_tiny_model
from tests.equivalence import oracle
from tests.equivalence.composed import composed_logits

BASE = "tiny"
PROMPT = [5, 17, 101, 44, 260, 9, 33, 71, 12]
NUM_TOKENS = 12
TARGETS = {
    "sql": ["q_proj", "v_proj", "down_proj"],
    "tone": "all-linear",
    "json": ["o_proj", "q_proj"],
    "more": ["v_proj"],
    "act": "all-linear",
}
RANKS = {"sql": 4, "tone": 8, "json": 2, "more": 3, "act": 4}
INVOCATION = [260, 9]  # of act: it begins there in the prompt
OWNERS = ("mine", "yours")  # of the last norm
NUM_IDS = 401  # that the tokenizer has; the model has more rows

# what a client sends → what it means
CASES: list[tuple[dict[str, Any], dict[str, float]]] = [
    ({"model": BASE}, {}),
    ({"model": "sql"}, {"sql": 1.0}),
    ({"model": "sql@0.5"}, {"sql": 0.5}),
    ({"model": f"{BASE}:sql@0.7+tone@0.3"}, {"sql": 0.7, "tone": 0.3}),
    ({"model": "tone+sql@-1.5"}, {"sql": -1.5, "tone": 1.0}),
    ({"model": "tone@0.5+sql@0+tone@0.25"}, {"tone": 0.75}),
    (
        {"model": BASE, "adapters": [{"name": "json"}, {"name": "sql", "weight": 0.4}, {"name": "tone", "weight": 2}]},
        {"json": 1.0, "sql": 0.4, "tone": 2.0},
    ),
    ({"model": "act"}, {"act": 1.0}),
    ({"model": "act@0.5+tone@0.75"}, {"act": 0.5, "tone": 0.75}),
    ({"model": BASE, "lora": [{"id": 2, "scale": 0.8}, {"id": "sql", "scale": 0.8}]}, {"json": 0.8, "sql": 0.8}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("composed")
    model = save_tiny_model(folder / "model")
    made = {
        name: oracle.make_adapter(
            model,
            folder / name,
            seed=rank,
            std=0.15,
            r=rank,
            lora_alpha=2 * rank,
            target_modules=TARGETS[name],
            alora_invocation_tokens=INVOCATION if name == "act" else None,
        )
        for name, rank in RANKS.items()
    }
    for name in OWNERS:
        made[name] = oracle.make_adapter(
            model, folder / name, seed=len(name), std=0.15, r=2, target_modules=["q_proj"], modules_to_save=["norm"]
        )
        file = made[name] / "adapter_model.safetensors"
        tensors = {key: tensor + ("norm" in key) * 0.25 for key, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return {"": model, **made}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[InProcessServer]:
    config = ServerConfig(
        engine=EngineConfig(
            model=ModelConfig(model=str(folders[""]), dtype="float32", device="cpu"),
            cache=CacheConfig(kv_cache_memory=16 * MIB),
            lora=LoRALimits(lora_memory=16 * MIB, max_loras=3),
        ),
        http=HTTPConfig(port=free_port()),
        served_model_names=(BASE,),
        lora_modules=tuple((name, folders[name]) for name in (*RANKS, *OWNERS)),
    )
    with in_process(config) as running:
        yield running
        running.check_integrity()


async def ask_all(url: str) -> list[Any]:
    """All cases at once, so that they meet in one batch."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as sdk:
        asking = []
        for case, _ in CASES:
            extra = {name: value for name, value in case.items() if name != "model"}
            extra |= {"ignore_eos": True, "return_token_ids": True}
            asking.append(
                sdk.completions.create(
                    model=case["model"],
                    prompt=PROMPT,
                    max_tokens=NUM_TOKENS,
                    temperature=0,
                    logprobs=1,
                    extra_body=extra,
                )
            )
        return await asyncio.gather(*asking)


def test_every_row_of_a_mixed_batch_is_the_sum_by_peft(server: InProcessServer, folders: dict[str, Path]) -> None:
    replies = asyncio.run(ask_all(server.url))
    versions = {name: server.context.adapters.registry.describe(name).ref.version for name in RANKS}
    plain = composed_logits(folders[""], [], PROMPT)
    for (case, weights), reply in zip(CASES, replies, strict=True):
        choice = reply.choices[0]
        token_ids = choice.model_extra["token_ids"]
        assert len(token_ids) == NUM_TOKENS
        logits = composed_logits(
            folders[""],
            [(folders[name], weight) for name, weight in weights.items()],
            [*PROMPT, *token_ids],
            {folders["act"]: PROMPT.index(INVOCATION[0])},
        )
        expected = logits[len(PROMPT) - 1 : -1, :NUM_IDS].log_softmax(-1)
        assert expected.argmax(-1).tolist() == token_ids, case
        largest = float(logits.abs().max())
        for at, (token_id, logprob) in enumerate(zip(token_ids, choice.logprobs.token_logprobs, strict=True)):
            assert math.isclose(logprob, float(expected[at, token_id]), abs_tol=2e-5 * largest), (case, at)
        if weights:
            assert float((logits[: len(PROMPT)] - plain).abs().max()) > 0.05 * largest, f"{case} does nothing"
        echoed = {each["name"]: each["weight"] for each in (reply.model_extra or {}).get("adapters", [])}
        assert echoed == (weights if case["model"] not in ("sql", "act") else {}), case
        assert all(each["version"] == versions[each["name"]] for each in (reply.model_extra or {}).get("adapters", []))
    assert len({tuple(reply.choices[0].model_extra["token_ids"]) for reply in replies}) == len(CASES)


def test_the_order_of_writing_is_irrelevant_even_to_the_cache(server: InProcessServer) -> None:
    prompt = [7 + at for at in range(40)]
    with OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as sdk:
        first = sdk.completions.create(model="json@0.5+sql@0.25", prompt=prompt, max_tokens=4, temperature=0)
        again = sdk.completions.create(model="sql@0.25+json@0.25+json@0.25", prompt=prompt, max_tokens=4, temperature=0)
        other = sdk.completions.create(model="json@0.25+sql@0.5", prompt=prompt, max_tokens=4, temperature=0)
    assert first.choices[0].text == again.choices[0].text

    def cached(reply: Any) -> int:
        return int(reply.usage.prompt_tokens_details.cached_tokens)

    assert (cached(first), cached(again), cached(other)) == (0, 32, 0)


def test_more_than_the_device_holds_is_told(server: InProcessServer) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as sdk:
        with pytest.raises(openai.ConflictError, match="this request names 4 adapters and one step holds 3") as refused:
            sdk.completions.create(model="sql+tone+json+more", prompt=PROMPT, max_tokens=1)
        assert refused.value.code == "adapter_capacity"


def test_two_that_replace_one_norm_are_refused(server: InProcessServer, folders: dict[str, Path]) -> None:
    versions = {name: server.context.adapters.registry.describe(name).ref.version for name in OWNERS}
    assert versions["mine"] != versions["yours"]
    with OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as sdk:
        with pytest.raises(
            openai.ConflictError, match="'mine' and 'yours' both replace 'model.layers.0.input_layernorm.weight'"
        ) as refused:
            sdk.completions.create(model="mine@0.5+yours", prompt=PROMPT, max_tokens=1)
        assert refused.value.code == "adapter_conflict"
        for model in ("mine+sql", "yours@0.5", "mine@0.5+yours@0"):
            sdk.completions.create(model=model, prompt=PROMPT, max_tokens=1)


def test_the_oracle_is_pefts_own_where_one_adapter_is_whole(folders: dict[str, Path]) -> None:
    alone = oracle.logits(folders[""], folders["tone"], PROMPT, torch.float32)
    assert torch.allclose(composed_logits(folders[""], [(folders["tone"], 1.0)], PROMPT), alone, atol=1e-4)
