"""Did the server really run the mix that was asked for? Read back from its replies and its own step counters.

A multi-adapter figure means nothing when the adapters never met in one forward pass. Three things are held together:
which version answered each request, how many distinct adapters and rows a step had on average by the server's own
histograms, and how many were in flight by the client's clock. Knows nothing of speed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.client import Reply

ADAPTERS_SERIES, ROWS_SERIES = "loramux:step_adapters", "loramux:step_rows"
TOLERANCE = 0.3  # of the client's mean: steps differ in length, and a queue's ends have fewer rows


class MixDiffers(Exception):
    """The server ran another mix than the one asked for, so its figures are of something else."""


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Sums over all steps so far, from the server's histograms."""

    steps: int
    adapters: float
    rows: float

    def since(self, before: "StepTotals") -> "StepTotals":
        return StepTotals(self.steps - before.steps, self.adapters - before.adapters, self.rows - before.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was seen. Means are per step by the server, per moment by the client."""

    steps: int
    adapters_per_step: float
    rows_per_step: float
    adapters_in_flight: float
    rows_in_flight: float
    requests_per_version: dict[str, int]

    def __str__(self) -> str:
        return (
            f"{len(self.requests_per_version)} versions answered; {self.steps} steps with {self.adapters_per_step:.2f} "
            f"adapters and {self.rows_per_step:.2f} rows on average, {self.adapters_in_flight:.2f} and "
            f"{self.rows_in_flight:.2f} in flight by the client's clock"
        )


def read_step_totals(exposition: str) -> StepTotals | None:
    """The totals in a /metrics page, None when it has no such series."""
    count = _value(exposition, f"{ADAPTERS_SERIES}_count")
    adapters, rows = _value(exposition, f"{ADAPTERS_SERIES}_sum"), _value(exposition, f"{ROWS_SERIES}_sum")
    if count is None or adapters is None or rows is None:
        return None
    return StepTotals(int(count), adapters, rows)


def _value(exposition: str, name: str) -> float | None:
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", exposition, re.MULTILINE)
    return sum(map(float, values)) if values else None


def prove(replies: Sequence[Reply], totals: StepTotals, *, base: str | None) -> Proof:
    """Raises MixDiffers unless the mix seen is the mix asked. `base` is the model name that means no adapter."""
    if totals.steps <= 0:
        raise MixDiffers("the server counted no steps while it was loaded; is another process answering?")
    rows, adapters = in_flight(replies, base=base)
    proof = Proof(
        steps=totals.steps,
        adapters_per_step=totals.adapters / totals.steps,
        rows_per_step=totals.rows / totals.steps,
        adapters_in_flight=adapters,
        rows_in_flight=rows,
        requests_per_version=_versions(replies, base=base),
    )
    _compare("adapters", proof.adapters_per_step, proof.adapters_in_flight)
    _compare("rows", proof.rows_per_step, proof.rows_in_flight)
    return proof


def _compare(what: str, per_step: float, by_client: float) -> None:
    if abs(per_step - by_client) > TOLERANCE * by_client:
        raise MixDiffers(
            f"a step held {per_step:.2f} {what} on average, {by_client:.2f} were in flight by the client's clock; "
            f"they may differ by {TOLERANCE:.0%}"
        )


def _versions(replies: Iterable[Reply], *, base: str | None) -> dict[str, int]:
    """Version → requests it answered; one name must be one version, and no two names the same one."""
    by_model: dict[str, set[str | None]] = {}
    for reply in replies:
        by_model.setdefault(reply.call.model, set()).add(reply.adapter_version)
    for model, versions in by_model.items():
        if len(versions) != 1:
            raise MixDiffers(f"{model!r} was answered by {len(versions)} versions: {sorted(map(str, versions))}")
        if (None in versions) != (model == base):
            raise MixDiffers(f"{model!r} was answered by {'the base' if None in versions else 'an adapter'}")
    distinct = {version for versions in by_model.values() for version in versions}
    if len(distinct) != len(by_model):
        raise MixDiffers(f"{len(by_model)} models were asked for and {len(distinct)} versions answered")
    return dict(Counter(str(reply.adapter_version) for reply in replies if reply.adapter_version is not None))


def in_flight(replies: Iterable[Reply], *, base: str | None) -> tuple[float, float]:
    """Mean requests and mean distinct adapters in flight, over the time from the first send to the last token."""
    changes = sorted(
        (moment, step, reply.call.model) for reply in replies for moment, step in ((reply.sent, 1), (reply.ended, -1))
    )
    running: Counter[str] = Counter()
    rows = adapters = 0.0
    for (moment, step, model), (following, _, _) in zip(changes, changes[1:], strict=False):
        running[model] += step
        rows += running.total() * (following - moment)
        adapters += sum(count > 0 for name, count in running.items() if name != base) * (following - moment)
    span = changes[-1][0] - changes[0][0]
    return rows / span, adapters / span
