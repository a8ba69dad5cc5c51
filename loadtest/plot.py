"""One run as a picture: how latencies are distributed, output over time, and adapters in flight and in a step.

Draws on a canvas in memory, so it needs no display. Knows nothing of how anything was measured.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator

from loadtest.client import Reply
from loadtest.run import Measurement, Sample

_BINS = 60  # of the time axis


def draw(measurement: Measurement, path: Path, *, title: str, base: str | None) -> None:
    """Write the picture of a run to `path`, in the format that its suffix names."""
    canvas = Canvas(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(canvas)
    whole = [reply for reply in measurement.replies if reply.error is None]
    start = min(reply.sent for reply in whole)
    (times, gaps), (rate, adapters) = canvas.subplots(2, 2)
    _draw_latencies(times, gaps, whole)
    _draw_rate(rate, whole, start)
    _draw_adapters(adapters, whole, measurement.samples, start, base)
    canvas.suptitle(title, fontsize=9, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)


def cumulative(values: Iterable[float]) -> tuple[list[float], list[float]]:
    """(sorted values, share of all values that are no larger than each)."""
    ordered = sorted(values)
    return ordered, [(rank + 1) / len(ordered) for rank in range(len(ordered))]


def tokens_per_second(replies: Sequence[Reply], start: float) -> tuple[list[float], list[float]]:
    """(middle of each bin in seconds from `start`, output tokens a second in it).

    A reply's tokens are spread evenly over its arrivals, as a chunk may carry several.
    """
    width = (max(reply.ended for reply in replies) - start) / _BINS
    tokens = [0.0] * _BINS
    for reply in replies:
        for moment in reply.arrivals:
            bin_index = min(_BINS - 1, int((moment - start) / width))
            tokens[bin_index] += reply.completion_tokens / len(reply.arrivals)
    return [(index + 0.5) * width for index in range(_BINS)], [count / width for count in tokens]


def adapters_over_time(replies: Sequence[Reply], start: float, *, base: str | None) -> tuple[list[float], list[int]]:
    """(seconds from `start`, distinct adapters in flight from then on, by the client's clock)."""
    changes = sorted(
        (moment, step, reply.call.model) for reply in replies for moment, step in ((reply.sent, 1), (reply.ended, -1))
    )
    running: Counter[str] = Counter()
    moments, counts = list[float](), list[int]()
    for moment, step, model in changes:
        running[model] += step
        moments.append(moment - start)
        counts.append(sum(count > 0 for name, count in running.items() if name != base))
    return moments, counts


def adapters_per_step(samples: Sequence[Sample], start: float) -> Iterator[tuple[float, float]]:
    """(seconds from `start`, the server's mean adapters a step since the sample before), where there was a step."""
    for earlier, later in itertools.pairwise(samples):
        grew = later.totals.since(earlier.totals)
        if grew.steps > 0:
            yield (earlier.moment + later.moment) / 2 - start, grew.adapters / grew.steps


def _draw_latencies(times: Axes, gaps: Axes, whole: Sequence[Reply]) -> None:
    first = [reply.time_to_first_token for reply in whole]
    per_token = [time for reply in whole if (time := reply.time_per_output_token) is not None]
    between = [gap for reply in whole for gap in reply.inter_token_latencies]
    _draw_curves(times, "Time to the first token, and end to end", TTFT=first, E2E=[each.end_to_end for each in whole])
    _draw_curves(gaps, "Time between tokens, and a token", ITL=between, TPOT=per_token)


def _draw_curves(axes: Axes, title: str, **seconds: Sequence[float]) -> None:
    """The cumulative distribution of each, in milliseconds on a logarithmic axis, where zero has no place."""
    axes.set(title=title, xlabel="ms", ylabel="share at most", ylim=(0, 1.02))
    for label, values in seconds.items():
        if any(value > 0 for value in values):
            axes.plot(*cumulative(value * 1e3 for value in values), label=label)
            axes.set_xscale("log", subs=[])
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


def _draw_rate(axes: Axes, whole: Sequence[Reply], start: float) -> None:
    axes.plot(*tokens_per_second(whole, start), drawstyle="steps-mid")
    axes.set(title="Output over time", xlabel="seconds", ylabel="output tok/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_adapters(
    axes: Axes, whole: Sequence[Reply], samples: Sequence[Sample], start: float, base: str | None
) -> None:
    axes.step(*adapters_over_time(whole, start, base=base), where="post", alpha=0.5, label="in flight, client's clock")
    per_step = list(adapters_per_step(samples, start))
    if per_step:
        axes.plot(*zip(*per_step, strict=True), marker="o", markersize=3, label="mean a step, server's count")
    axes.set(title="Distinct adapters", xlabel="seconds", ylabel="adapters")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
