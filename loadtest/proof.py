"""Did the server really run the mix that was asked for? Read back from its replies and its own step counters.

A multi-adapter figure means nothing when the adapters never met in one forward pass. Three things are held together:
which version answered each request, how many distinct adapters and rows a step had on average by the server's own
histograms, and how many were in flight by the client's clock. In an open loop the server decides how many rows a step
has, so its adapters are held against what that many requests, one after the other, had. Knows nothing of speed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from loadtest.client import Reply
from loadtest.exposition import value

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
    memory_over: float | None = None  # bytes the process has beyond what it says it gave to its parts; no sum

    def since(self, before: "StepTotals") -> "StepTotals":
        steps, adapters, rows = self.steps - before.steps, self.adapters - before.adapters, self.rows - before.rows
        return replace(self, steps=steps, adapters=adapters, rows=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was seen. Means are per step by the server, per moment by the client."""

    steps: int
    adapters_per_step: float
    rows_per_step: float
    adapters_in_flight: float
    rows_in_flight: float
    requests_per_version: dict[str, int]
    memory_over: float | None = None  # as of StepTotals, when the load ended

    def __str__(self) -> str:
        return (
            f"{len(self.requests_per_version)} versions answered; {self.steps} steps with {self.adapters_per_step:.2f} "
            f"adapters and {self.rows_per_step:.2f} rows on average, {self.adapters_in_flight:.2f} and "
            f"{self.rows_in_flight:.2f} in flight by the client's clock"
        )


def read_step_totals(page: str) -> StepTotals | None:
    """The totals in a /metrics page, None when it has no such series."""
    count = value(page, f"{ADAPTERS_SERIES}_count")
    adapters, rows = value(page, f"{ADAPTERS_SERIES}_sum"), value(page, f"{ROWS_SERIES}_sum")
    if count is None or adapters is None or rows is None:
        return None
    resident, given = value(page, "process_resident_memory_bytes"), value(page, "loramux:memory_bytes")
    over = None if resident is None or given is None else resident - given
    return StepTotals(int(count), adapters, rows, over)


def prove(replies: Sequence[Reply], totals: StepTotals, *, base: str | None, is_open: bool = False) -> Proof:
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
        memory_over=totals.memory_over,
    )
    if is_open:
        _check_open_loop(replies, proof, base=base)
    else:
        _compare("adapters", proof.adapters_per_step, proof.adapters_in_flight, "were in flight by the client's clock")
        _compare("rows", proof.rows_per_step, proof.rows_in_flight, "were in flight by the client's clock")
    return proof


def _compare(what: str, per_step: float, expected: float, source: str) -> None:
    if abs(per_step - expected) > TOLERANCE * expected:
        raise MixDiffers(
            f"a step held {per_step:.2f} {what} on average, {expected:.2f} {source}; they may differ by {TOLERANCE:.0%}"
        )


def _check_open_loop(replies: Sequence[Reply], proof: Proof, *, base: str | None) -> None:
    if proof.rows_per_step > (1 + TOLERANCE) * proof.rows_in_flight:
        raise MixDiffers(
            f"a step held {proof.rows_per_step:.2f} rows on average, but only {proof.rows_in_flight:.2f} were in "
            "flight by the client's clock; is somebody else using the server?"
        )
    models = [reply.call.model for reply in sorted(replies, key=lambda reply: reply.call.index)]
    company = adapters_in_company(models, proof.rows_per_step, base=base)
    _compare("adapters", proof.adapters_per_step, company, "were in as many requests sent one after the other")


def adapters_in_company(models: Sequence[str], size: float, *, base: str | None) -> float:
    """Mean distinct adapters among `size` consecutive requests, between two whole sizes by straight line."""
    size = min(size, len(models))
    low = max(1, int(size))
    high = min(low + 1, len(models))
    return _distinct(models, low, base) + (size - low) * (_distinct(models, high, base) - _distinct(models, low, base))


def _distinct(models: Sequence[str], size: int, base: str | None) -> float:
    windows = [models[start : start + size] for start in range(len(models) - size + 1)]
    return sum(len(set(window) - {base}) for window in windows) / len(windows)


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
    """Mean requests and mean distinct adapters in flight, over all the time in which there were any."""
    changes = sorted(
        (moment, step, reply.call.model) for reply in replies for moment, step in ((reply.sent, 1), (reply.ended, -1))
    )
    running: Counter[str] = Counter()
    rows = adapters = busy = 0.0
    for (moment, step, model), (following, _, _) in zip(changes, changes[1:], strict=False):
        running[model] += step
        rows += running.total() * (following - moment)
        adapters += sum(count > 0 for name, count in running.items() if name != base) * (following - moment)
        busy += (following - moment) * (running.total() > 0)
    return rows / busy, adapters / busy
