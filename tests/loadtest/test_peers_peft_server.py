"""The PEFT peer answers what PEFT itself generates, each request with its own adapter, whatever shares its batch."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loadtest import peft_server
from loadtest.client import LoadTestFailed, Target, by_model, send
from loadtest.peft_server import Batcher, choose_threads, create_app, load
from loadtest.workload import Call

_WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A tiny base and two adapters that move it far."""
    root = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, eos_token_id=63
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "base")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*_WORDS, "?", "<eos>"])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(root / "base")
    for seed in range(2):
        torch.manual_seed(seed)
        plain = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
        model = get_peft_model(plain, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
        model.save_pretrained(root / f"a{seed}")
    return root / "base", [root / "a0", root / "a1"]


@pytest.fixture(scope="module")
def batcher_parts(folders: tuple[Path, list[Path]]) -> Iterator[tuple[PeftModel, PreTrainedTokenizerFast]]:
    yield load(*folders)


def _call(model: str, prompt: str, max_tokens: int = 8) -> Call:
    return Call(0, model, 0, prompt, max_tokens)


async def _texts(client: TestClient, calls: list[Call]) -> list[str]:
    """Replies to `calls`, sent together."""

    async def text(call: Call) -> str:
        async with client.post("/v1/completions", json=by_model(call)) as response:
            return (await response.read()).decode()

    return await asyncio.gather(*map(text, calls))


@pytest.mark.asyncio
async def test_each_request_gets_its_own_adapter(batcher_parts: tuple) -> None:
    calls = [_call("a0", "w1 w2 w3"), _call("a1", "w1 w2 w3"), _call("base", "w1 w2 w3"), _call("a1", "w4 w5")]
    async with TestClient(TestServer(create_app(Batcher(*batcher_parts, max_batch=4)))) as client:
        together = await _texts(client, calls)
        alone = [(await _texts(client, [call]))[0] for call in calls]
    assert together == alone
    assert len(set(together)) == 4


@pytest.mark.asyncio
async def test_lengths_and_usage_are_what_the_load_test_asks_for(batcher_parts: tuple) -> None:
    calls = [_call("a0", "w1 w2 w3", 5), _call("a1", "w1", 9)]
    server = TestServer(create_app(Batcher(*batcher_parts, max_batch=4)))
    async with server:
        target = Target(str(server.make_url("")).rstrip("/"), by_model)
        replies = {reply.call.model: reply for reply in await send(target, calls, 2)}
    assert [(replies[name].prompt_tokens, replies[name].completion_tokens) for name in ("a0", "a1")] == [(3, 5), (1, 9)]
    assert [len(replies[name].arrivals) for name in ("a0", "a1")] == [5, 9]


@pytest.mark.asyncio
async def test_waiting_requests_share_a_batch_up_to_the_limit(batcher_parts: tuple) -> None:
    batcher = Batcher(*batcher_parts, max_batch=2)
    sizes: list[int] = []
    generate = batcher._generate
    batcher._generate = lambda batch, loop: (sizes.append(len(batch)), generate(batch, loop))  # type: ignore[method-assign]
    async with TestClient(TestServer(create_app(batcher))) as client:
        await _texts(client, [_call("a0", "w1")] * 5)
    assert sizes == [2, 2, 1]


@pytest.mark.asyncio
async def test_unknown_adapter_is_an_error(batcher_parts: tuple) -> None:
    async with TestServer(create_app(Batcher(*batcher_parts, max_batch=2))) as server:
        target = Target(str(server.make_url("")).rstrip("/"), by_model)
        with pytest.raises(ExceptionGroup) as raised:
            await send(target, [_call("a7", "w1")], 1)
    assert raised.group_contains(LoadTestFailed, match="no adapter 'a7'")


def test_threads_are_tried_out(batcher_parts: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock runs slower with more threads here: one must win, wherever it stands."""
    tried: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", tried.append)
    moment = 0.0

    def perf_counter() -> float:
        nonlocal moment
        moment += tried[-1]
        return moment

    monkeypatch.setattr(peft_server.time, "perf_counter", perf_counter)
    assert choose_threads(batcher_parts[0], [2, 1, 3]) == 1
    assert tried == [2, 1, 3]
