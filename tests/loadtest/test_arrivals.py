"""Schedules are seeded, end when they say, and vary as much as they say; the client keeps to them or says how late."""

import asyncio
import statistics
import time

import pytest

from loadtest import client
from loadtest.arrivals import ARRIVALS, schedule
from loadtest.client import Target, by_model
from loadtest.report import measure
from loadtest.workload import Workload
from tests.loadtest.fake_server import FakeServer


def _gaps(moments: list[float]) -> list[float]:
    return [later - earlier for earlier, later in zip([0.0, *moments], moments, strict=False)]


@pytest.mark.parametrize(("arrivals", "cv"), [("poisson", 1.0), ("gamma", 0.5), ("gamma", 4.0), ("constant", 1.0)])
def test_schedule_takes_exactly_the_time_of_its_rate(arrivals: str, cv: float) -> None:
    moments = schedule(200, arrivals=arrivals, rate=8.0, cv=cv, seed=3)
    assert moments[-1] == pytest.approx(25.0)
    assert moments == sorted(moments)
    assert moments[0] > 0


@pytest.mark.parametrize(("arrivals", "cv"), [("poisson", 1.0), ("gamma", 0.5), ("gamma", 2.0)])
def test_gaps_have_the_variation_asked_for(arrivals: str, cv: float) -> None:
    gaps = _gaps(schedule(5000, arrivals=arrivals, rate=10.0, cv=cv, seed=1))
    assert statistics.mean(gaps) == pytest.approx(0.1)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.1)


def test_poisson_gaps_are_exponential() -> None:
    """P(gap > t) = exp(-rate t): a half, an eighth and a 64th of the gaps are longer than 1, 3 and 6 half-lives."""
    gaps = _gaps(schedule(4000, arrivals="poisson", rate=1.0, cv=1.0, seed=5))
    for half_lives in (1, 3, 6):
        longer = sum(gap > half_lives * 0.6931 for gap in gaps) / len(gaps)
        assert longer == pytest.approx(0.5**half_lives, rel=0.25)


def test_constant_gaps_are_equal() -> None:
    assert _gaps(schedule(4, arrivals="constant", rate=2.0, cv=1.0, seed=0)) == pytest.approx([0.5] * 4)


def test_seed_decides_the_schedule() -> None:
    first, again, other = (schedule(20, arrivals="poisson", rate=1.0, cv=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"arrivals": "poisson"}, "--rate"),
        ({"arrivals": "poisson", "rate": 0.0}, "above 0"),
        ({"arrivals": "poisson", "rate": 1.0, "cv": 2.0}, "choose gamma"),
        ({"arrivals": "gamma", "rate": 1.0, "cv": 0.0}, "constant"),
        ({"arrivals": "closed", "rate": 1.0}, "a closed loop has no rate"),
        ({"arrivals": "weekly", "rate": 1.0}, ", ".join(ARRIVALS)),
    ],
)
def test_impossible_arrivals_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Workload(models=("a",), **wrong)


def _open_loop(**changes: object) -> Workload:
    settings = {"arrivals": "constant", "rate": 40.0, "num_requests": 10, "max_tokens": 30, "prompt_words": 4}
    return Workload(models=("a", "b"), **{**settings, **changes})


@pytest.mark.asyncio
async def test_open_loop_waits_for_no_reply() -> None:
    """Thirty steps of 4 ms a reply, one every 25 ms: several are in flight, and none is sent before its time."""
    async with FakeServer().url() as url:
        replies = await client.run(Target(url, by_model), _open_loop())
    replies.sort(key=lambda reply: reply.call.index)
    scheduled = [reply.scheduled for reply in replies]
    assert _gaps(scheduled)[1:] == pytest.approx([1 / 40] * 9)
    assert all(reply.sent >= moment for reply, moment in zip(replies, scheduled, strict=True))
    assert replies[1].sent < replies[0].ended


@pytest.mark.asyncio
async def test_client_that_is_late_says_so() -> None:
    """With its event loop blocked by something else the client is late; the figures say how late, and warn of it."""

    async def block() -> None:
        while True:
            time.sleep(0.06)
            await asyncio.sleep(0)

    async with FakeServer().url() as url:
        blocking = asyncio.create_task(block())
        replies = await client.run(Target(url, by_model), _open_loop(num_requests=4, max_tokens=2))
        blocking.cancel()
    figures = measure(replies, None)
    assert figures.lateness_ms is not None and figures.lateness_ms.p99 > 20
    assert "late at p99" in figures.warnings[0]


@pytest.mark.asyncio
async def test_closed_loop_has_no_lateness() -> None:
    async with FakeServer().url() as url:
        replies = await client.run(Target(url, by_model), Workload(models=("a",), num_requests=2, max_tokens=2))
    assert measure(replies, None).lateness_ms is None
