"""What a newcomer does, against the real thing: the OpenAI SDK, base and adapters in one batch, hot loads, faults."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.module_names import linears_of
from adapters.ops import bf16_dot
from adapters.samples.registry import TASKS
from tests.adapters import hostile
from tests.end_to_end.conftest import RunningServer, start_server
from tests.equivalence import oracle

BASE = "SmolLM2-135M-Instruct"
SAMPLES = Path(__file__).parents[2] / "adapters" / "samples"
SAMPLE_NAMES = sorted(folder.parent.name for folder in SAMPLES.glob("*/adapter_config.json"))
QUESTION = "What is the capital of France?"


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as opened:
        yield opened


def answer(client: openai.OpenAI, model: str, prompt: str = QUESTION, max_tokens: int = 24) -> str:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=max_tokens
    )
    return reply.choices[0].message.content or ""


def held_out_prompt(name: str) -> str:
    return TASKS[name].items("held-out", 1, seed=5)[0].prompt


def test_lists_the_base_first_and_every_sample(client: openai.OpenAI) -> None:
    cards = list(client.models.list())
    assert cards[0].id == BASE
    assert {card.id for card in cards[1:]} >= set(SAMPLE_NAMES) and len(SAMPLE_NAMES) >= 3
    assert client.models.retrieve(SAMPLE_NAMES[0]).id == SAMPLE_NAMES[0]


def test_the_base_answers_and_adapters_do_their_task_better(client: openai.OpenAI) -> None:
    assert "Paris" in answer(client, BASE)
    for name in SAMPLE_NAMES:
        task = TASKS[name]
        scores = {BASE: 0.0, name: 0.0}
        for item in task.items("held-out", 3, seed=5):
            for model in scores:
                metrics = task.score(item, answer(client, model, item.prompt, task.max_new_tokens))
                scores[model] += next(iter(metrics.values()))
        assert scores[name] > scores[BASE], scores
    prompt = held_out_prompt(SAMPLE_NAMES[0])
    assert answer(client, f"{BASE}:{SAMPLE_NAMES[0]}", prompt) == answer(client, SAMPLE_NAMES[0], prompt)


@pytest.mark.asyncio
async def test_a_mixed_batch_streams_what_each_gives_alone(server: RunningServer, client: openai.OpenAI) -> None:
    """Base and every sample at once, each on every sample's own prompt."""
    cases = [(model, held_out_prompt(name)) for name in SAMPLE_NAMES for model in (BASE, *SAMPLE_NAMES)]
    alone = [answer(client, *case) for case in cases]
    assert len(set(alone)) > len(SAMPLE_NAMES) * 2, alone
    steps_before = step_adapters(server)

    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as async_client:

        async def stream(model: str, prompt: str) -> str:
            chunks = await async_client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=24,
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        streamed = await asyncio.gather(*[stream(*case) for case in cases])
    of = dict(zip(cases, alone, strict=True))
    differing = {case: text for case, text in zip(cases, streamed, strict=True) if text != of[case]}
    if bf16_dot.is_supported():
        # Every kernel gives a row the same bits in any company, cached or not.
        assert not differing
    # Elsewhere bfloat16 logits of other batch shapes may differ in the last bit, which may break a tie of two tokens
    # otherwise; such an answer still begins as it did alone, and is nobody else's.
    assert len(differing) <= 2, differing
    for (model, prompt), text in differing.items():
        assert text[:2] == of[model, prompt][:2], (model, text, of[model, prompt])
        assert text not in [of[other, prompt] for other in (BASE, *SAMPLE_NAMES) if other != model]
    assert step_adapters(server) > steps_before, "no step held all adapters: nothing was mixed"


def step_adapters(server: RunningServer) -> float:
    """How many steps so far held as many distinct adapters as there are samples, or more."""
    lines = server.get("/metrics").text.splitlines()
    counts = {
        line.partition('le="')[2].partition('"')[0]: float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("loramux:step_adapters_bucket")
    }
    below = max(bound for bound in counts if bound != "+Inf" and float(bound) < len(SAMPLE_NAMES))
    return counts["+Inf"] - counts[below]


def test_an_unknown_model_is_a_404_and_never_the_base(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        answer(client, "nobody")
    assert caught.value.code == "model_not_found" and "nobody" in caught.value.message


def test_hot_load_replace_and_unload_in_vllms_dialect(
    server: RunningServer, client: openai.OpenAI, default_model_folder: Path, tmp_path: Path
) -> None:
    folders = [
        oracle.make_adapter(
            default_model_folder,
            tmp_path / str(i),
            seed=i,
            std=0.3,
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj"],
        )
        for i in range(2)
    ]

    def load(folder: Path, **extra: object) -> httpx.Response:
        body = {"lora_name": "hot", "lora_path": str(folder), **extra}
        return httpx.post(server.url + "/v1/load_lora_adapter", json=body, timeout=60)

    plain = answer(client, BASE)
    first = load(folders[0])
    assert (first.status_code, first.text) == (200, "Success: LoRA adapter 'hot' added successfully.")
    before = answer(client, "hot")
    assert before != plain
    assert load(folders[0]).status_code == 200, "the same name and bytes again is a success"
    clash = load(folders[1])
    assert clash.status_code == 400 and "has already been loaded" in clash.json()["error"]["message"]
    assert load(folders[1], load_inplace=True).status_code == 200
    after = answer(client, "hot")
    assert after not in (before, plain)
    gone = httpx.post(server.url + "/v1/unload_lora_adapter", json={"lora_name": "hot"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'hot' removed successfully.")
    with pytest.raises(openai.NotFoundError):
        answer(client, "hot")
    assert answer(client, BASE) == plain


def test_hostile_folders_are_refused_and_change_nothing(
    server: RunningServer, client: openai.OpenAI, default_model_folder: Path, tmp_path: Path
) -> None:
    plain, listed = answer(client, BASE), names_and_versions(server)
    with torch.device("meta"):
        base = linears_of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(default_model_folder)))
    meanwhile: list[str] = []
    with ThreadPoolExecutor(1) as elsewhere:
        for case in hostile.HOSTILE:
            answering = elsewhere.submit(answer, client, BASE)
            folder = tmp_path / case.name
            case.build(hostile.draft(folder, base))
            reply = httpx.post(
                server.url + "/v1/adapters?wait=60", json={"name": "evil", "source": str(folder)}, timeout=60
            )
            assert 400 <= reply.status_code < 500, (case.name, reply.text)
            assert reply.json()["error"]["code"] == case.code, (case.name, reply.text)
            meanwhile.append(answering.result())
    assert set(meanwhile) == {plain}, "a request beside a hostile load answered otherwise"
    assert names_and_versions(server) == listed
    assert answer(client, BASE) == plain


def names_and_versions(server: RunningServer) -> list[tuple[str, str]]:
    return [(each["name"], each["version"]) for each in server.get("/v1/adapters").json()["data"]]


def test_a_client_that_leaves_frees_its_blocks_and_lease(server: RunningServer) -> None:
    body = {
        "model": SAMPLE_NAMES[0],
        "prompt": "Once upon a time",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert leases(server, SAMPLE_NAMES[0]) == 1
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (
        leases(server, SAMPLE_NAMES[0]) or gauge(server, "vllm:kv_cache_usage_perc")
    ):
        time.sleep(0.05)
    assert leases(server, SAMPLE_NAMES[0]) == 0
    assert gauge(server, "vllm:num_requests_running") == 0
    assert gauge(server, "vllm:kv_cache_usage_perc") == 0


def leases(server: RunningServer, name: str) -> int:
    return int(server.get(f"/v1/adapters/{name}").json()["leases"])


def gauge(server: RunningServer, name: str) -> float:
    lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith(name + "{")]
    return float(lines[0].rpartition(" ")[2])


def test_sigterm_drains_and_exits_0(tmp_path: Path, default_model_folder: Path) -> None:
    server = start_server(tmp_path / "log", "--shutdown-timeout", "30")
    body = {"model": BASE, "prompt": "Count:", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises((httpx.HTTPStatusError, httpx.TransportError)):
            httpx.post(server.url + "/v1/completions", json={**body, "stream": False}, timeout=10).raise_for_status()
        rest = list(lines)
    assert rest[-1] == "data: [DONE]" or "data: [DONE]" in rest, rest[-3:]
    assert server.process.wait(timeout=40) == 0, server.log.read_text()


def test_says_at_start_what_it_serves_and_how_to_try_it(tmp_path: Path, default_model_folder: Path) -> None:
    server = start_server(tmp_path / "log")
    try:
        deadline = time.monotonic() + 30
        while "curl" not in (text := server.log.read_text()):  # said just after the first request can be answered
            assert time.monotonic() < deadline, text
            time.sleep(0.05)
        assert BASE in text and all(name in text for name in SAMPLE_NAMES)
    finally:
        assert server.stop() == 0


def test_a_public_host_without_a_key_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve", "--host", "0.0.0.0"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and "--api-key" in done.stderr + done.stdout
