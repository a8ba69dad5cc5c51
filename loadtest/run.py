"""One workload against one running server: warm up, measure, prove the mix."""

from loadtest import client
from loadtest.client import Target
from loadtest.proof import StepTotals, prove, read_step_totals
from loadtest.report import Figures, measure
from loadtest.workload import Workload


async def run_once(target: Target, workload: Workload, *, base: str | None, warm_up: bool = True) -> Figures:
    """Raises LoadTestFailed when a request fails, MixDiffers when the server ran another mix than asked.

    `base` is the model name that means no adapter. A server without our step counters is measured unproven.
    """
    if warm_up:
        await client.send(target, workload.warm_up(), workload.in_flight)
    before = await _step_totals(target)
    replies = await client.run(target, workload)
    after = await _step_totals(target)
    proof = None
    if before is not None and after is not None:
        proof = prove(replies, after.since(before), base=base)
    return measure(replies, proof)


async def _step_totals(target: Target) -> StepTotals | None:
    page = await client.fetch_text(target, "/metrics")
    return None if page is None else read_step_totals(page)
