"""Workloads are seeded and of the mix they say; figures and proofs on known numbers."""

import statistics

import pytest

from loadtest.client import Reply
from loadtest.exposition import adapter_traffic, value
from loadtest.proof import MixDiffers, StepTotals, adapters_in_company, in_flight, prove, read_step_totals
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


@pytest.mark.parametrize(
    "wrong", [{"models": ()}, {"in_flight": 0}, {"popularity": "viral"}, {"lengths": "p9"}, {"scale": 0}]
)
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


def test_idle_time_is_no_part_of_the_mean_in_flight() -> None:
    # [0, 1) a; nothing for nine seconds; [10, 11) a and b
    replies = [_reply("a", 0, 1, "1"), _reply("a", 10, 11, "1"), _reply("b", 10, 11, "2")]
    assert in_flight(replies, base=None) == (pytest.approx(1.5), pytest.approx(1.5))


def test_adapters_in_company_by_hand() -> None:
    models = ["a", "a", "b", "base"]
    assert adapters_in_company(models, 1, base="base") == pytest.approx(3 / 4)
    assert adapters_in_company(models, 2, base="base") == pytest.approx((1 + 2 + 1) / 3)
    assert adapters_in_company(models, 1.5, base="base") == pytest.approx((3 / 4 + 4 / 3) / 2)
    assert adapters_in_company(models, 4, base="base") == adapters_in_company(models, 99, base="base") == 2


def test_lengths_have_the_means_they_say() -> None:
    calls = Workload(models=("a",), num_requests=4000, lengths="p2").calls()
    prompts, outputs = [call.prompt_tokens for call in calls], [call.max_tokens for call in calls]
    assert statistics.mean(prompts) == pytest.approx(240, rel=0.04)
    assert statistics.mean(outputs) == pytest.approx(220, rel=0.04)
    assert min(prompts + outputs) >= 4 and max(prompts + outputs) <= 1024
    assert statistics.median(prompts) < 0.85 * statistics.mean(prompts)  # skewed, as chats are


@pytest.mark.parametrize(
    ("lengths", "scale", "expected"),
    [("p1", 1, (128, 512)), ("p3", 1, (2048, 64)), ("p1", 0.25, (32, 128)), ("fixed", 0.5, (32, 32))],
)
def test_lengths_are_the_standard_set_times_the_scale(lengths: str, scale: float, expected: tuple[int, int]) -> None:
    (call,) = Workload(models=("a",), num_requests=1, lengths=lengths, scale=scale).calls()
    assert (len(call.prompt.split()), call.max_tokens) == (call.prompt_tokens, call.max_tokens) == expected


def test_uniform_lengths_span_their_range() -> None:
    calls = Workload(models=("a",), num_requests=2000, lengths="p4").calls()
    for lengths in ([call.prompt_tokens for call in calls], [call.max_tokens for call in calls]):
        assert 8 <= min(lengths) < 16 and 504 < max(lengths) <= 512
        assert statistics.mean(lengths) == pytest.approx(260, rel=0.05)


def test_warm_up_can_be_shorter_than_the_list_of_models() -> None:
    many = tuple(f"a{i}" for i in range(1000))
    assert len(Workload(models=many).warm_up()) == 1000
    assert len(Workload(models=many, warm_up_requests=8).warm_up()) == 8
    assert Workload(models=many, warm_up_requests=0).warm_up() == []


def test_adapter_traffic_takes_counters_of_moves_only() -> None:
    page = "\n".join(
        [
            'loramux:adapter_loads_total{model_name="m",result="loaded"} 3.0',
            'loramux:adapter_loads_total{model_name="m",result="replaced"} 1.0',
            'loramux:adapter_evictions_total{model_name="m"} 2.0',
            'vllm:lora_adapter_load_seconds_count{model_name="m"} 4.0',
            'vllm:lora_adapter_load_seconds_sum{model_name="m"} 0.5',
            'vllm:lora_adapter_loaded{adapter_name="a"} 1.0',
            'loramux:adapter_requests_total{adapter="a"} 9.0',
        ]
    )
    assert adapter_traffic(page) == {
        "loramux:adapter_loads_total": 4,
        "loramux:adapter_evictions_total": 2,
        "vllm:lora_adapter_load_seconds_count": 4,
    }
    assert value(page, "loramux:adapter_requests_total") == 9 and value(page, "loramux:adapter_requests") is None


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
    memory = """
loramux:memory_bytes{model_name="m",part="weights"} 3.0
loramux:memory_bytes{model_name="m",part="kv_cache"} 4.0
process_resident_memory_bytes 1.2e+01"""
    totals = read_step_totals(page + memory)
    assert totals == StepTotals(4, 12.0, 25.0, memory_over=5.0)
    assert totals.since(StepTotals(1, 2.0, 5.0, memory_over=9.0)) == StepTotals(3, 10.0, 20.0, memory_over=5.0)
    assert read_step_totals("vllm:num_requests_running 1.0") is None


@pytest.mark.parametrize("totals", [StepTotals(0, 0, 0), StepTotals(10, 9, 20), StepTotals(10, 20, 40)])
def test_proof_fails_when_the_server_counted_otherwise(totals: StepTotals) -> None:
    replies = [_reply("a", 0, 3, "1"), _reply("b", 0, 3, "2")]
    assert prove(replies, StepTotals(10, 20, 20), base=None).adapters_in_flight == 2
    with pytest.raises(MixDiffers):
        prove(replies, totals, base=None)
