"""Replies → figures: throughput and the percentiles of TTFT, ITL and end-to-end time, as JSON and as a line to read."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest.client import Reply
from loadtest.proof import Proof
from loadtest.workload import Workload


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Milliseconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Percentiles":
        return cls(*(round(percentile(seconds, share) * 1e3, 2) for share in (0.5, 0.9, 0.99)))

    def __str__(self) -> str:
        return f"{self.p50:.0f} / {self.p90:.0f} / {self.p99:.0f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One measured workload."""

    output_tokens_per_second: float
    wall_seconds: float
    output_tokens: int
    prompt_tokens: int
    ttft_ms: Percentiles  # from sending to the first token
    itl_ms: Percentiles  # between tokens
    e2e_ms: Percentiles
    proof: Proof | None  # None: the server has no step counters to prove the mix with

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.output_tokens_per_second:.1f} output tok/s "
            f"({self.output_tokens} tokens in {self.wall_seconds:.1f} s)\n"
            f"  TTFT ms p50/p90/p99  {self.ttft_ms}\n"
            f"  ITL ms p50/p90/p99   {self.itl_ms}\n"
            f"  mix                  {self.proof or 'not provable: this server has no loramux:step_* metrics'}"
        )


def measure(replies: Sequence[Reply], proof: Proof | None) -> Figures:
    wall = max(reply.ended for reply in replies) - min(reply.sent for reply in replies)
    output = sum(reply.completion_tokens for reply in replies)
    return Figures(
        output_tokens_per_second=round(output / wall, 2),
        wall_seconds=round(wall, 3),
        output_tokens=output,
        prompt_tokens=sum(reply.prompt_tokens for reply in replies),
        ttft_ms=Percentiles.of([reply.time_to_first_token for reply in replies]),
        itl_ms=Percentiles.of([latency for reply in replies for latency in reply.inter_token_latencies] or [0.0]),
        e2e_ms=Percentiles.of([reply.ended - reply.sent for reply in replies]),
        proof=proof,
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the smallest value that at least `share` of all values do not pass."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def describe_workload(workload: Workload) -> str:
    return (
        f"{workload.in_flight} in flight, {len(workload.models)} models {workload.popularity}, "
        f"{workload.num_requests} requests, {workload.prompt_words}-word prompts, {workload.max_tokens} output tokens, "
        f"greedy, seed {workload.seed}"
    )


def describe_machine() -> str:
    """Processor and usable cores, as a table's caption wants them."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"
