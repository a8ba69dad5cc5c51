"""Goodput: how many requests a second met every limit given, of the time to first token, per token, and end to end.

A request that failed met none. Knows nothing of how times were taken.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from loadtest.client import Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Milliseconds at most; None is no limit."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Limits":
        """["ttft=1000", "tpot=100"] → limits; ValueError names the one that cannot be read."""
        names, limits = {field.name for field in fields(cls)}, dict[str, float]()
        for text in texts:
            name, _, number = text.partition("=")
            if name not in names or not _is_positive(number):
                raise ValueError(f"{text!r} is not a limit; write {', '.join(f'{each}=MS' for each in sorted(names))}")
            limits[name] = float(number)
        return cls(**limits)

    def met_by(self, reply: Reply) -> bool:
        if reply.error is not None:
            return False
        times = (reply.time_to_first_token, reply.time_per_output_token, reply.end_to_end)
        pairs = zip(times, (self.ttft, self.tpot, self.e2e), strict=True)
        return all(time is None or limit is None or time * 1e3 <= limit for time, limit in pairs)

    def __str__(self) -> str:
        limits = {"TTFT": self.ttft, "TPOT": self.tpot, "E2E": self.e2e}
        return ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits.items() if limit is not None)


@dataclass(frozen=True, slots=True)
class Goodput:
    limits: Limits
    requests_per_second: float
    share: float  # of all requests sent

    @classmethod
    def of(cls, replies: Sequence[Reply], limits: Limits, wall_seconds: float) -> "Goodput":
        good = sum(limits.met_by(reply) for reply in replies)
        return cls(limits, round(good / wall_seconds, 3), round(good / len(replies), 4))

    def __str__(self) -> str:
        return f"{self.requests_per_second:.2f} req/s, {self.share:.1%} of requests ({self.limits})"


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False
