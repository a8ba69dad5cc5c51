"""The load test against a server that behaves and servers that do not: a figure stands only with its mix proven."""

import pytest

from loadtest.__main__ import main
from loadtest.client import LoadTestFailed, Target, by_lora_field, by_model
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
