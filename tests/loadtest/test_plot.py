"""A picture is drawn of any run, and its curves are the run's."""

from pathlib import Path

import pytest

from loadtest.client import Reply, Target, by_model
from loadtest.plot import adapters_over_time, adapters_per_step, cumulative, draw, tokens_per_second
from loadtest.proof import StepTotals
from loadtest.run import Sample, measure_once
from loadtest.workload import Workload
from tests.loadtest.fake_server import FakeServer


def _reply(model: str, sent: float, arrivals: list[float], tokens: int) -> Reply:
    call = Workload(models=(model,), num_requests=1).calls()[0]
    return Reply(call, sent, "v", arrivals, 5, tokens)


def test_cumulative_reaches_one() -> None:
    assert cumulative([3.0, 1.0, 2.0, 2.0]) == ([1.0, 2.0, 2.0, 3.0], [0.25, 0.5, 0.75, 1.0])


def test_output_over_time_holds_every_token() -> None:
    replies = [_reply("a", 0.0, [1.0, 2.0, 3.0], 6), _reply("b", 1.0, [6.0], 1)]
    middles, rates = tokens_per_second(replies, 0.0)
    width = 6.0 / len(middles)
    assert middles[0] == pytest.approx(width / 2)
    assert sum(rates) * width == pytest.approx(7)
    assert sum(rate for middle, rate in zip(middles, rates, strict=True) if middle < 4) * width == pytest.approx(6)


def test_adapters_over_time_counts_each_once_and_the_base_never() -> None:
    replies = [
        _reply(name, sent, [end], 1) for name, sent, end in [("a", 0, 4), ("a", 1, 2), ("b", 1, 3), ("base", 0, 5)]
    ]
    moments, counts = adapters_over_time(replies, 0.0, base="base")
    after = dict(zip(moments, counts, strict=True))
    assert after == {0: 1, 1: 2, 2: 2, 3: 1, 4: 0, 5: 0}


def test_adapters_per_step_is_between_samples() -> None:
    totals = [StepTotals(0, 0, 0), StepTotals(10, 30, 40), StepTotals(10, 30, 40), StepTotals(20, 80, 90)]
    samples = [Sample(float(moment), each) for moment, each in enumerate(totals)]
    assert list(adapters_per_step(samples, 0.0)) == [(0.5, 3.0), (2.5, 5.0)]


@pytest.mark.asyncio
async def test_run_is_drawn_with_the_servers_steps(tmp_path: Path) -> None:
    workload = Workload(models=("base", "a", "b"), num_requests=9, in_flight=3, max_tokens=12)
    async with FakeServer().url() as url:
        measurement = await measure_once(Target(url, by_model), workload, base="base", sample_seconds=0.02)
    assert len(measurement.samples) >= 3
    draw(measurement, tmp_path / "deep" / "run.png", title="three models", base="base")
    assert (tmp_path / "deep" / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.asyncio
async def test_run_of_one_token_without_samples_is_drawn_too(tmp_path: Path) -> None:
    workload = Workload(models=("a",), num_requests=1, in_flight=1, max_tokens=1)
    async with FakeServer(with_metrics=False).url() as url:
        measurement = await measure_once(Target(url, by_model), workload, base=None)
    draw(measurement, tmp_path / "run.png", title="one token", base=None)
    assert (tmp_path / "run.png").stat().st_size > 1000
