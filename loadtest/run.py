"""One workload against one running server: warm up, measure, prove the mix."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from loadtest import client
from loadtest.client import LoadTestFailed, Reply, Target
from loadtest.exposition import adapter_traffic
from loadtest.goodput import Limits
from loadtest.proof import StepTotals, prove, read_step_totals
from loadtest.report import Figures, measure
from loadtest.workload import Workload


@dataclass(frozen=True, slots=True)
class Sample:
    """The server's step counters at one moment of the monotonic clock."""

    moment: float
    totals: StepTotals


@dataclass(frozen=True, slots=True)
class Measurement:
    """A run's figures and what they were made of, for a plot."""

    figures: Figures
    replies: Sequence[Reply]
    samples: Sequence[Sample]  # empty unless asked for


async def run_once(
    target: Target,
    workload: Workload,
    *,
    base: str | None,
    warm_up: bool = True,
    limits: Limits | None = None,
    max_errors: int = 0,
) -> Figures:
    """Raises LoadTestFailed when a request fails, MixDiffers when the server ran another mix than asked.

    `base` is the model name that means no adapter. A server without our step counters is measured unproven.
    `max_errors` requests may fail before the run does.
    """
    measurement = await measure_once(target, workload, base=base, warm_up=warm_up, limits=limits, max_errors=max_errors)
    return measurement.figures


async def measure_once(
    target: Target,
    workload: Workload,
    *,
    base: str | None,
    warm_up: bool = True,
    limits: Limits | None = None,
    max_errors: int = 0,
    sample_seconds: float | None = None,
) -> Measurement:
    """As `run_once`; `sample_seconds` also reads the step counters that often, which costs the server a little."""
    if warm_up:
        await client.send(target, workload.warm_up(), workload.in_flight)
    before = await client.fetch_text(target, "/metrics")
    async with _sampled(target, sample_seconds) as samples:
        cpu = time.process_time()
        replies = await client.run(target, workload, max_errors=max_errors)
        cpu = time.process_time() - cpu
    after = await client.fetch_text(target, "/metrics")
    whole = [reply for reply in replies if reply.error is None]
    if not whole:
        raise LoadTestFailed(f"all {len(replies)} requests failed, the first with: {replies[0].error}")
    totals = _growth(before, after)
    proof = None if totals is None else prove(whole, totals, base=base, is_open=workload.is_open)
    traffic = adapter_traffic(after or "") - adapter_traffic(before or "")
    figures = measure(replies, proof, limits=limits, cpu_seconds=cpu, adapter_traffic=traffic)
    return Measurement(figures, replies, samples)


def _growth(before: str | None, after: str | None) -> StepTotals | None:
    """What the step counters grew by between two /metrics pages; None when the server has none."""
    first, last = read_step_totals(before or ""), read_step_totals(after or "")
    return None if first is None or last is None else last.since(first)


@asynccontextmanager
async def _sampled(target: Target, seconds: float | None) -> AsyncIterator[list[Sample]]:
    """Step counters every so many seconds while the context is open; the list fills meanwhile."""
    samples: list[Sample] = []
    task = None if seconds is None else asyncio.create_task(_sample_forever(target, seconds, samples))
    try:
        yield samples
    finally:
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _sample_forever(target: Target, seconds: float, samples: list[Sample]) -> None:
    while (totals := read_step_totals(await client.fetch_text(target, "/metrics") or "")) is not None:
        samples.append(Sample(time.monotonic(), totals))
        await asyncio.sleep(seconds)
