"""The load test against a server that behaves and servers that do not: a figure stands only with its mix proven."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.client import LoadTestFailed, Target, by_lora_field, by_model
from loadtest.goodput import Limits
from loadtest.model_list import fetch_models
from loadtest.proof import MixDiffers
from loadtest.run import run_once
from loadtest.workload import Workload
from tests.loadtest.fake_server import FakeServer

_MIX = Workload(models=("base", "a", "b", "c"), in_flight=4, num_requests=16, prompt_words=4, max_tokens=12)


async def _measure(server: FakeServer, workload: Workload = _MIX):
    async with server.url() as url:
        return await run_once(Target(url, by_model), workload, base="base")


@pytest.mark.asyncio
async def test_measures_and_proves_the_mix() -> None:
    figures = await _measure(FakeServer())
    assert figures.output_tokens == 16 * 12
    assert figures.prompt_tokens == 16 * 5
    assert figures.proof is not None
    assert figures.proof.requests_per_version == {"v-a": 4, "v-b": 4, "v-c": 4}
    assert figures.proof.adapters_per_step == pytest.approx(3, abs=0.6)
    assert figures.output_tokens_per_second == pytest.approx(16 * 12 / figures.wall_seconds, rel=0.01)
    assert figures.ttft_ms.p50 <= figures.ttft_ms.p99 <= figures.e2e_ms.p99


@pytest.mark.asyncio
async def test_adapters_that_never_meet_fail() -> None:
    with pytest.raises(MixDiffers, match="adapters on average"):
        await _measure(FakeServer(serial=True))


@pytest.mark.asyncio
async def test_two_names_with_one_version_fail() -> None:
    with pytest.raises(MixDiffers, match="4 models were asked for and 2 versions answered"):
        await _measure(FakeServer(one_version=True))


@pytest.mark.asyncio
async def test_base_answered_for_an_adapter_fails() -> None:
    server = FakeServer()
    async with server.url() as url:
        with pytest.raises(MixDiffers, match="'base' was answered by the base"):
            await run_once(Target(url, by_model), _MIX, base=None)


@pytest.mark.asyncio
async def test_reply_of_another_length_fails() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        await _measure(FakeServer(short=True))
    assert raised.group_contains(LoadTestFailed, match="9 tokens, not the 10 it asked for")


@pytest.mark.asyncio
async def test_server_without_step_counters_is_measured_unproven() -> None:
    figures = await _measure(FakeServer(with_metrics=False))
    assert figures.proof is None
    assert "not provable" in str(figures)


@pytest.mark.asyncio
async def test_adapter_is_chosen_by_number_for_llama_cpp() -> None:
    server = FakeServer(with_metrics=False)
    async with server.url() as url:
        workload = Workload(models=("a0", "a1"), in_flight=1, num_requests=2, max_tokens=1)
        await run_once(Target(url, by_lora_field(2)), workload, base=None, warm_up=False)
    assert [body["lora"] for body in server.bodies] == [
        [{"id": 0, "scale": 1.0}, {"id": 1, "scale": 0.0}],
        [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}],
    ]


def test_addresses_elsewhere_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--url", "http://192.0.2.1:8000", "--models", "a"]) == 1
    assert "not an address of this machine" in capsys.readouterr().err


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--url", "http://127.0.0.1:1", "--models", "a"]) == 1
    assert capsys.readouterr().err.startswith("FAILED: Cannot connect")


_OPEN = Workload(
    models=("base", "a", "b", "c", "d", "e"),
    num_requests=30,
    prompt_words=4,
    max_tokens=20,
    arrivals="poisson",
    rate=60.0,
    popularity="uniform",
)


@pytest.mark.asyncio
async def test_open_loop_is_measured_and_its_mix_proven() -> None:
    async with FakeServer().url() as url:
        figures = await run_once(Target(url, by_model), _OPEN, base="base", limits=Limits(e2e=60_000))
    assert figures.proof is not None and figures.proof.adapters_per_step > 1.5
    assert figures.lateness_ms is not None
    assert figures.goodput is not None and figures.goodput.share == 1
    assert figures.shares == _OPEN.shares()
    assert figures.prompt_tokens == figures.prompt_tokens_asked + 30  # the fake counts one more for each prompt's start
    assert figures.client is not None and figures.client.cpu_share > 0


@pytest.mark.asyncio
async def test_open_loop_over_a_server_that_groups_by_adapter_fails() -> None:
    async with FakeServer(groups_alike=True).url() as url:
        with pytest.raises(MixDiffers, match="were in as many requests sent one after the other"):
            await run_once(Target(url, by_model), _OPEN, base="base")


@pytest.mark.asyncio
async def test_somebody_elses_rows_fail_an_open_loop() -> None:
    others = Workload(models=("e",), num_requests=40, in_flight=40, prompt_words=4, max_tokens=250)
    async with FakeServer().url() as url:
        target = Target(url, by_model)
        noise = asyncio.create_task(run_once(target, others, base=None, warm_up=False))
        with pytest.raises(MixDiffers, match="is somebody else using the server"):
            await run_once(target, _OPEN, base="base", warm_up=False)
        noise.cancel()


@pytest.mark.asyncio
async def test_adapters_moved_are_read_back() -> None:
    figures = await _measure(FakeServer())
    assert figures.adapter_traffic == {"loramux:adapter_loads_total": 16}


@pytest.mark.asyncio
async def test_standard_lengths_are_what_is_asked_for() -> None:
    server = FakeServer()
    workload = Workload(models=("a",), num_requests=6, lengths="p4", scale=0.05, in_flight=3)
    async with server.url() as url:
        figures = await run_once(Target(url, by_model), workload, base=None, warm_up=False)
    calls = {call.prompt: call for call in workload.calls()}
    assert [body["max_tokens"] for body in server.bodies] == [
        calls[body["prompt"]].max_tokens for body in server.bodies
    ]
    assert figures.output_tokens == sum(call.max_tokens for call in calls.values())


@pytest.mark.asyncio
async def test_models_are_read_from_the_server() -> None:
    async with FakeServer(adapters=("a", "b", "c")).url() as url:
        models = await fetch_models(Target(url, by_model))
    assert models.select(None, with_base=False) == ("a", "b", "c")
    assert models.select(2, with_base=True) == ("a", "b", "base")
    assert models.select(0, with_base=False) == ("base",)
    with pytest.raises(ValueError, match="--num-adapters 4 is not between 0 and the 3 adapters registered"):
        models.select(4, with_base=False)


async def _run_command(server: FakeServer, *arguments: str | Path) -> int:
    """`loadtest run` in a thread of its own, as it starts an event loop."""
    async with server.url() as url:
        words = ["run", "--url", url, *map(str, arguments)]
        return await asyncio.to_thread(main, words)


_SMALL: Sequence[str] = ("--num-requests", "9", "--in-flight", "3", "--max-tokens", "12", "--prompt-words", "20")


@pytest.mark.asyncio
async def test_command_writes_json_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeServer(adapters=("a", "b", "c"))
    results = ("--results", tmp_path, "--plot", "--sample-seconds", "0.05", "--goodput", "ttft=60000")
    assert await _run_command(server, "--models-from-server", "--num-adapters", "2", *_SMALL, *results) == 0
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("run-*.json"))
    assert record["workload"]["models"] == ["a", "b"]
    assert record["base"] == "base"
    assert record["figures"]["output_tokens"] == 9 * 12
    assert record["figures"]["goodput"]["share"] == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".png"]
    assert "top-1 share 55.6%" in capsys.readouterr().out


@pytest.mark.asyncio
async def test_strict_makes_a_warning_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """The fake counts a token more than words, too many for one-word prompts."""
    doubtful = ("--models", "a,b,c", *_SMALL, "--prompt-words", "1")
    assert await _run_command(FakeServer(), *doubtful) == 0
    assert await _run_command(FakeServer(), *doubtful, "--strict") == 1
    assert "WARNING: prompts came to 18 tokens where 9 were asked for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "a", "--plot"], "--plot without a path"),
        (["--models", "a", "--num-adapters", "3"], "use --models-from-server"),
        (["--models", "a", "--cv", "0", "--rate", "1"], "must be above 0"),
        (["--models", "a", "--popularity", "viral"], "popularity 'viral' is not one of identical"),
        (["--models", "a", "--goodput", "ttft"], "'ttft' is not a limit"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--url", "http://127.0.0.1:1", *arguments]) == 1
    assert said in capsys.readouterr().err
