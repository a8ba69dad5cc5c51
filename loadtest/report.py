"""Replies → figures: throughput, the percentiles of TTFT, TPOT, ITL and end-to-end time, goodput, what the client cost.

As JSON, as lines to read and as a Markdown table. What makes a figure doubtful is said as a warning beside it.
"""

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from loadtest.arrivals import GAMMA
from loadtest.client import Reply
from loadtest.goodput import Goodput, Limits
from loadtest.lengths import FIXED, STANDARD
from loadtest.popularity import Shares
from loadtest.proof import Proof
from loadtest.workload import Workload

MAX_LATENESS_MS = 20.0  # p99; later than this and the arrivals were not those of the workload
MAX_CLIENT_SHARE = 0.15  # of a core; above it the client slows the server it measures
MAX_LENGTH_ERROR = 0.1  # of the prompt tokens asked for


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
        places = 0 if self.p50 >= 100 else 1
        return " / ".join(f"{time:.{places}f}" for time in (self.p50, self.p90, self.p99))


@dataclass(frozen=True, slots=True)
class ClientCost:
    """What this process took of the machine while it measured."""

    cpu_share: float  # of one core
    cpu_us_per_token: float

    def __str__(self) -> str:
        return f"{self.cpu_share:.1%} of a core, {self.cpu_us_per_token:.0f} µs a token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One measured workload. Times are of the requests that were answered in full."""

    output_tokens_per_second: float
    wall_seconds: float  # from the first send to the last token
    output_tokens: int
    prompt_tokens: int
    ttft_ms: Percentiles  # from sending to the first token
    itl_ms: Percentiles  # between tokens, all gaps of all requests in one pool
    e2e_ms: Percentiles
    proof: Proof | None  # None: the server has no step counters to prove the mix with
    tpot_ms: Percentiles | None = None  # (E2E - TTFT) / (tokens - 1), one value a request
    total_tokens_per_second: float = 0.0  # prompt and output
    requests_per_second: float = 0.0
    requests: int = 0  # answered
    errors: int = 0
    goodput: Goodput | None = None
    prompt_tokens_asked: int = 0
    shares: Shares | None = None
    lateness_ms: Percentiles | None = None  # how late the client itself sent, in an open loop
    client: ClientCost | None = None
    adapter_traffic: Mapping[str, int] = field(default_factory=dict)  # growth of the server's counters of it
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) of everything that was measured."""
        rows: list[tuple[str, object]] = [
            ("requests", f"{self.requests} at {self.requests_per_second:.2f} req/s, {self.errors} errors"),
            ("total tok/s", f"{self.total_tokens_per_second:.1f}"),
            ("TTFT ms p50/p90/p99", self.ttft_ms),
            ("TPOT ms p50/p90/p99", self.tpot_ms),
            ("ITL ms p50/p90/p99", self.itl_ms),
            ("E2E ms p50/p90/p99", self.e2e_ms),
            ("goodput", self.goodput),
            ("prompt tokens", f"{self.prompt_tokens}, asked for {self.prompt_tokens_asked}"),
            ("popularity", self.shares),
            ("mix", self.proof or "not provable: this server has no loramux:step_* metrics"),
            ("adapters moved", ", ".join(f"{name} {grew}" for name, grew in self.adapter_traffic.items()) or None),
            ("sent late ms p50/p90/p99", self.lateness_ms),
            ("client", self.client),
        ]
        return [(what, str(value)) for what, value in rows if value is not None]

    def __str__(self) -> str:
        head = (
            f"{self.output_tokens_per_second:.1f} output tok/s "
            f"({self.output_tokens} tokens in {self.wall_seconds:.1f} s)"
        )
        lines = [f"  {what:<25} {value}" for what, value in self.rows()]
        return "\n".join([head, *lines, *(f"  WARNING: {warning}" for warning in self.warnings)])

    def markdown(self) -> str:
        rows = [("output tok/s", f"{self.output_tokens_per_second:.1f}"), *self.rows()]
        lines = ["| figure | value |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
        return "\n".join([*lines, *(f"\n**Warning:** {warning}." for warning in self.warnings)])


def measure(
    replies: Sequence[Reply],
    proof: Proof | None,
    *,
    limits: Limits | None = None,
    cpu_seconds: float | None = None,
    adapter_traffic: Mapping[str, int] | None = None,
) -> Figures:
    """The figures of replies of which at least one is whole. `cpu_seconds` is what this process used meanwhile."""
    whole = [reply for reply in replies if reply.error is None]
    wall = max(reply.ended for reply in whole) - min(reply.sent for reply in replies)
    output, prompt = sum(reply.completion_tokens for reply in whole), sum(reply.prompt_tokens for reply in whole)
    per_token = [reply.time_per_output_token for reply in whole]
    figures = Figures(
        output_tokens_per_second=round(output / wall, 2),
        wall_seconds=round(wall, 3),
        output_tokens=output,
        prompt_tokens=prompt,
        prompt_tokens_asked=sum(reply.call.prompt_tokens for reply in whole),
        total_tokens_per_second=round((output + prompt) / wall, 2),
        requests=len(whole),
        requests_per_second=round(len(whole) / wall, 3),
        errors=len(replies) - len(whole),
        goodput=None if limits is None else Goodput.of(replies, limits, wall),
        shares=Shares.of(reply.call.model for reply in replies),
        client=None if cpu_seconds is None else _client_cost(cpu_seconds, wall, output),
        adapter_traffic=dict(adapter_traffic or {}),
        proof=proof,
        ttft_ms=Percentiles.of([reply.time_to_first_token for reply in whole]),
        tpot_ms=Percentiles.of([time for time in per_token if time is not None] or [0.0]),
        itl_ms=Percentiles.of([latency for reply in whole for latency in reply.inter_token_latencies] or [0.0]),
        e2e_ms=Percentiles.of([reply.end_to_end for reply in whole]),
        lateness_ms=_lateness(replies),
    )
    return replace(figures, warnings=tuple(_doubts(figures)))


def _lateness(replies: Sequence[Reply]) -> Percentiles | None:
    late = [reply.sent - reply.scheduled for reply in replies if reply.scheduled is not None]
    return Percentiles.of(late) if late else None


def _client_cost(cpu_seconds: float, wall: float, output_tokens: int) -> ClientCost:
    return ClientCost(round(cpu_seconds / wall, 4), round(cpu_seconds / output_tokens * 1e6, 1))


def _doubts(figures: Figures) -> Iterator[str]:
    """What stands between these figures and the workload they are said to be of."""
    if figures.lateness_ms is not None and figures.lateness_ms.p99 > MAX_LATENESS_MS:
        yield (
            f"the client sent {figures.lateness_ms.p99:.0f} ms late at p99, over {MAX_LATENESS_MS:.0f} ms, so the "
            "arrivals were not those asked for; lower the rate or give the client a core of its own"
        )
    if figures.client is not None and figures.client.cpu_share > MAX_CLIENT_SHARE:
        yield (
            f"the client took {figures.client.cpu_share:.0%} of a core, over {MAX_CLIENT_SHARE:.0%}, from a server on "
            "the same machine"
        )
    asked, got = figures.prompt_tokens_asked, figures.prompt_tokens
    if asked and abs(got - asked) > MAX_LENGTH_ERROR * asked:
        yield f"prompts came to {got} tokens where {asked} were asked for: the vocabulary splits the words otherwise"


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the smallest value that at least `share` of all values do not pass."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def describe_workload(workload: Workload) -> str:
    lengths = f"{workload.prompt_words}-word prompts, {workload.max_tokens} output tokens"
    if workload.lengths != FIXED:
        lengths = f"{workload.lengths.upper()} ({STANDARD[workload.lengths].text})"
    if workload.scale != 1:
        lengths += f", lengths × {workload.scale:g}"
    return (
        f"{_describe_arrivals(workload)}, {len(workload.models)} models {workload.popularity}, "
        f"{workload.num_requests} requests, {lengths}, greedy, seed {workload.seed}"
    )


def _describe_arrivals(workload: Workload) -> str:
    if not workload.is_open:
        return f"{workload.in_flight} in flight"
    burst = f" (cv {workload.cv:g})" if workload.arrivals == GAMMA else ""
    return f"{workload.arrivals} arrivals{burst} at {workload.rate:g} req/s"


def describe_machine() -> str:
    """Processor and usable cores, as a table's caption wants them."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"
