"""Workloads are seeded and of the mix they say; figures and proofs on known numbers."""

import pytest

from loadtest.client import Reply
from loadtest.proof import MixDiffers, StepTotals, in_flight, prove, read_step_totals
from loadtest.report import percentile
from loadtest.workload import Workload


def test_two_workloads_of_one_seed_are_equal() -> None:
    workload = Workload(models=("a", "b"), num_requests=6)
    assert workload.calls() == workload.calls()
    assert Workload(models=("a", "b"), num_requests=6, seed=1).calls() != workload.calls()
    assert len({call.prompt for call in workload.calls()}) == 6


def test_round_robin_gives_every_model_its_share() -> None:
    assert Workload(models=("a", "b", "c"), num_requests=9).asked() == {"a": 3, "b": 3, "c": 3}


def test_zipf_prefers_the_first() -> None:
    asked = Workload(models=tuple("abcdefgh"), num_requests=400, popularity="zipf").asked()
    assert asked["a"] > 2 * asked["d"] > 0


def test_warm_up_shares_no_prompt_with_the_measured_part() -> None:
    workload = Workload(models=("a", "b"), num_requests=50)
    assert not {call.prompt for call in workload.warm_up()} & {call.prompt for call in workload.calls()}


@pytest.mark.parametrize("wrong", [{"models": ()}, {"in_flight": 0}, {"popularity": "viral"}])
def test_impossible_workloads_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        Workload(**{"models": ("a",), **wrong})


def test_percentile_is_nearest_rank() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99)] == [50.0, 90.0, 99.0]
    assert percentile([3.0], 0.99) == 3.0


def _reply(model: str, sent: float, ended: float, version: str | None) -> Reply:
    call = Workload(models=(model,), num_requests=1).calls()[0]
    return Reply(call, sent, version, [ended], 5, 64)


def test_in_flight_is_weighted_by_time() -> None:
    # [0, 1) a; [1, 3) a and b; [3, 4) b and base
    replies = [_reply("a", 0, 3, "1"), _reply("b", 1, 4, "2"), _reply("base", 3, 4, None)]
    rows, adapters = in_flight(replies, base="base")
    assert rows == pytest.approx((1 + 2 * 2 + 2) / 4)
    assert adapters == pytest.approx((1 + 2 * 2 + 1) / 4)


def test_step_totals_sum_over_labels() -> None:
    page = "\n".join(
        [
            "# TYPE loramux:step_adapters histogram",
            'loramux:step_adapters_bucket{le="1.0",model_name="m"} 3.0',
            'loramux:step_adapters_sum{model_name="m"} 12.0',
            'loramux:step_adapters_count{model_name="m"} 4.0',
            'loramux:step_rows_sum{model_name="m"} 2.5e+01',
        ]
    )
    assert read_step_totals(page) == StepTotals(4, 12.0, 25.0)
    assert read_step_totals("vllm:num_requests_running 1.0") is None


@pytest.mark.parametrize("totals", [StepTotals(0, 0, 0), StepTotals(10, 9, 20), StepTotals(10, 20, 40)])
def test_proof_fails_when_the_server_counted_otherwise(totals: StepTotals) -> None:
    replies = [_reply("a", 0, 3, "1"), _reply("b", 0, 3, "2")]
    assert prove(replies, StepTotals(10, 20, 20), base=None).adapters_in_flight == 2
    with pytest.raises(MixDiffers):
        prove(replies, totals, base=None)
