"""One workload against one endpoint: warmed up, measured, its mix proven, and the part in which all rows decode.

Knows nothing of comparisons.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest import client
from loadtest.client import LoadTestFailed, Reply, Target
from loadtest.peers_endpoints import Endpoint
from loadtest.proof import Proof, StepTotals, prove, read_step_totals
from loadtest.report import Figures, measure
from loadtest.workload import Workload

_WARM_UP_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class Decode:
    """The time in which every request of a wave had its first token and none its last."""

    tokens_per_second: float
    mean_context: float  # tokens of prompt and output a row attends to, half-way through its output


@dataclass(frozen=True, slots=True)
class Measured:
    figures: Figures
    decode: Decode | None  # None: there was no such time

    def to_dict(self) -> dict[str, Any]:
        return {**self.figures.to_dict(), "decode": None if self.decode is None else asdict(self.decode)}


async def warm_up(endpoint: Endpoint, workload: Workload) -> None:
    """So many requests that every row has been used, with prompts nobody sends again."""
    calls = workload.warm_up()[:_WARM_UP_REQUESTS]
    with endpoint.awake():
        await client.send(endpoint.target, calls, workload.in_flight)


async def measure_once(endpoint: Endpoint, workload: Workload) -> Measured:
    """Raises MixDiffers when a server that counts its steps ran another mix than asked."""
    with endpoint.awake():
        before = await _step_totals(endpoint.target)
        replies = await client.run(endpoint.target, workload)
        after = await _step_totals(endpoint.target)
    proof = _prove(endpoint, replies, before, after)
    return Measured(measure(replies, proof), decode_window(replies))


def decode_window(replies: Sequence[Reply]) -> Decode | None:
    """Tokens a second between the last first token and the first last token; replies must have been sent together."""
    start = max(reply.arrivals[0] for reply in replies)
    end = min(reply.ended for reply in replies)
    if end <= start:
        return None
    tokens = 0.0
    for reply in replies:
        # A token whose text is held back arrives with a later one, so a chunk may be more than a token.
        a_chunk = reply.completion_tokens / len(reply.arrivals)
        tokens += a_chunk * sum(start < moment <= end for moment in reply.arrivals)
    context = sum(reply.prompt_tokens + reply.completion_tokens / 2 for reply in replies) / len(replies)
    return Decode(tokens / (end - start), context)


async def _step_totals(target: Target) -> StepTotals | None:
    page = await client.fetch_text(target, "/metrics")
    return None if page is None else read_step_totals(page)


def _prove(
    endpoint: Endpoint, replies: Sequence[Reply], before: StepTotals | None, after: StepTotals | None
) -> Proof | None:
    if not endpoint.proves:
        return None
    if before is None or after is None:
        raise LoadTestFailed(f"{endpoint.name} shows no loramux:step_* metrics, so its mix cannot be proven")
    return prove(replies, after.since(before), base=endpoint.base_model)
