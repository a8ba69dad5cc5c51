"""What is told is what is scraped: times, counts by difference, bounded names, no stale series."""

import sys
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.adapter_metrics import IDLE_SECONDS, AdapterResidency, ResidencySnapshot
from server.engine.request import EngineStats, FinishReason, RequestOutput
from server.metrics import Metrics

VLLM_NAMES = """
vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc vllm:cache_config_info
vllm:prefix_cache_queries_total vllm:prefix_cache_hits_total vllm:prompt_tokens_total vllm:generation_tokens_total
vllm:num_preemptions_total vllm:time_to_first_token_seconds_bucket vllm:inter_token_latency_seconds_bucket
vllm:request_time_per_output_token_seconds_bucket vllm:e2e_request_latency_seconds_bucket
vllm:request_queue_time_seconds_bucket vllm:request_prefill_time_seconds_bucket
vllm:request_decode_time_seconds_bucket vllm:request_inference_time_seconds_bucket
vllm:request_prompt_tokens_bucket vllm:request_generation_tokens_bucket vllm:request_success_total
vllm:lora_requests_info vllm:lora_adapter_loaded vllm:num_gpu_loaded_lora_adapters
vllm:num_cpu_loaded_lora_adapters vllm:max_gpu_lora_adapters vllm:lora_adapter_load_seconds_bucket
loramux:step_adapters_bucket loramux:step_rows_bucket loramux:step_tokens_bucket loramux:adapter_requests_total
loramux:adapter_tokens_total loramux:adapter_time_to_first_token_seconds_bucket
loramux:adapter_e2e_request_latency_seconds_bucket loramux:adapter_loads_total loramux:errors_total
""".split()


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics("base", max_adapters=2, clock=clock)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels but model_name) → value. Parsing refuses duplicate or malformed lines."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            is_ours = not sample.name.startswith(("process_", "python_"))  # what every process says of itself
            assert not is_ours or labels.pop("model_name") == "base", sample
            assert labels.pop("engine", None) == ("0" if sample.name.startswith("vllm:") else None), sample
            key = (sample.name, tuple(sorted(labels.items())))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def output(*token_ids: int, reason: FinishReason | None = None, scheduled: float | None = None) -> RequestOutput:
    return RequestOutput(request_id="r", new_token_ids=token_ids, finish_reason=reason, first_scheduled_time=scheduled)


def run_request(metrics: Metrics, adapter: str | None) -> None:
    metrics.request_started(adapter=adapter, num_prompt_tokens=3).observe(output(1, reason=FinishReason.STOP))


def test_every_promised_name_is_there(metrics: Metrics) -> None:
    metrics.set_cache_config(block_size=16, num_gpu_blocks=100)
    row = AdapterResidency(name="a", version="v", lora_rank=8, is_registered=True, in_flight=False)
    metrics.watch_adapters(lambda: ResidencySnapshot(adapters=[row]))
    metrics.error(404, "model_not_found")
    metrics.adapter_loaded("loaded", 0.2)
    run_request(metrics, "a")
    assert set(VLLM_NAMES) <= {name for name, _ in samples(metrics)}
    assert value(metrics, "vllm:cache_config_info", block_size="16", num_gpu_blocks="100") == 1


def test_times_of_one_request(metrics: Metrics, clock: Clock) -> None:
    request = metrics.request_started(adapter="a", num_prompt_tokens=7, arrival_time=1000.0)
    for now, out in (
        (1003.0, output(5, scheduled=1002.0)),
        (1004.0, output(6)),
        (1006.0, output(7, 8, reason=FinishReason.LENGTH)),
    ):
        clock.now = now
        request.observe(out)
    request.finish(FinishReason.ABORT)  # the connection closes afterwards: says nothing new
    sums = {
        "vllm:time_to_first_token_seconds": 3.0,
        "vllm:request_queue_time_seconds": 2.0,
        "vllm:request_prefill_time_seconds": 1.0,
        "vllm:inter_token_latency_seconds": 3.0,
        "vllm:request_decode_time_seconds": 3.0,
        "vllm:request_inference_time_seconds": 4.0,
        "vllm:request_time_per_output_token_seconds": 1.0,
        "vllm:e2e_request_latency_seconds": 6.0,
        "vllm:request_prompt_tokens": 7.0,
        "vllm:request_generation_tokens": 4.0,
    }
    found = samples(metrics)
    assert {name: found[f"{name}_sum", ()] for name in sums} == pytest.approx(sums)
    assert found["vllm:inter_token_latency_seconds_count", ()] == 2
    assert found["vllm:prompt_tokens_total", ()] == 7
    assert found["vllm:generation_tokens_total", ()] == 4
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 0
    assert value(metrics, "loramux:adapter_tokens_total", adapter="a", direction="prompt") == 7
    assert value(metrics, "loramux:adapter_tokens_total", adapter="a", direction="generation") == 4
    assert value(metrics, "loramux:adapter_requests_total", adapter="a", finished_reason="length") == 1
    assert value(metrics, "loramux:adapter_e2e_request_latency_seconds_sum", adapter="a") == 6


def test_a_request_that_never_ran_has_no_token_times(metrics: Metrics) -> None:
    request = metrics.request_started(adapter=None, num_prompt_tokens=7)
    request.finish(FinishReason.ABORT)
    found = samples(metrics)
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert found[f"vllm:{name}_seconds_count", ()] == 0
    assert found["vllm:prompt_tokens_total", ()] == 0
    assert value(metrics, "loramux:adapter_requests_total", adapter="base", finished_reason="abort") == 1


@pytest.mark.parametrize(("reason", "counted"), [("stop", 7), ("length", 7), ("abort", 0), ("error", 0)])
def test_a_prompt_that_was_only_scored_counts(metrics: Metrics, reason: str, counted: int) -> None:
    metrics.request_started(adapter="a", num_prompt_tokens=7).observe(output(reason=FinishReason(reason)))
    assert value(metrics, "vllm:prompt_tokens_total") == counted
    assert value(metrics, "loramux:adapter_tokens_total", adapter="a", direction="prompt") == counted
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 0


def test_counters_grow_by_the_difference(metrics: Metrics) -> None:
    for total in (5, 5, 9, 2):  # the last is a new engine's
        metrics.observe_step(EngineStats(prefix_queries=total, num_preemptions=total))
    assert value(metrics, "vllm:prefix_cache_queries_total") == 9 + 2
    assert value(metrics, "vllm:num_preemptions_total") == 9 + 2


def test_steps_tell_their_mix_and_idle_reports_do_not_count(metrics: Metrics) -> None:
    for adapters, rows in ((8, 8), (8, 32), (0, 4)):
        metrics.observe_step(
            EngineStats(num_step_rows=rows, num_step_adapters=adapters, num_step_tokens=rows, num_running=rows)
        )
    metrics.observe_step(EngineStats(num_waiting=2, kv_usage=0.25))
    found = samples(metrics)
    assert found["loramux:step_adapters_count", ()] == 3
    assert found["loramux:step_adapters_sum", ()] == 16
    assert found["loramux:step_rows_sum", ()] == 44
    assert found["loramux:step_adapters_bucket", (("le", "6.0"),)] == 1
    assert found["loramux:step_adapters_bucket", (("le", "8.0"),)] == 3
    assert (found["vllm:num_requests_running", ()], found["vllm:num_requests_waiting", ()]) == (0, 2)
    assert found["vllm:kv_cache_usage_perc", ()] == 0.25


def test_names_are_bounded(metrics: Metrics, clock: Clock) -> None:
    for adapter in ("a", "b", "c", "d", "other", "a", None):
        run_request(metrics, adapter)
    assert requests_by_adapter(metrics) == {"a": 2, "b": 1, "other": 3, "base": 1}
    clock.now += IDLE_SECONDS / 2
    run_request(metrics, "b")
    clock.now += IDLE_SECONDS / 2 + 1
    run_request(metrics, "c")  # takes the place of a, idle for longer than IDLE_SECONDS
    assert requests_by_adapter(metrics) == {"b": 2, "c": 1, "other": 3, "base": 1}


def requests_by_adapter(metrics: Metrics) -> dict[str, float]:
    return {
        dict(labels)["adapter"]: count
        for (name, labels), count in samples(metrics).items()
        if name == "loramux:adapter_requests_total"
    }


def test_unloading_drops_the_series_for_good(metrics: Metrics) -> None:
    running = metrics.request_started(adapter="a", num_prompt_tokens=3)
    running.observe(output(1))
    run_request(metrics, "a")
    metrics.adapter_unloaded("a")
    running.observe(output(2, reason=FinishReason.STOP))
    metrics.adapter_unloaded("never seen")
    assert not [key for key in samples(metrics) if ("adapter", "a") in key[1]]
    assert value(metrics, "vllm:generation_tokens_total") == 3
    for adapter in ("b", "c"):  # its place is free
        run_request(metrics, adapter)
    assert requests_by_adapter(metrics) == {"b": 1, "c": 1}


def test_a_thousand_adapters_do_not_grow_the_page(metrics: Metrics) -> None:
    for number in range(3):
        run_request(metrics, f"adapter-{number}")
    size = len(samples(metrics))
    for number in range(1000):
        run_request(metrics, f"adapter-{number}")
    assert len(samples(metrics)) == size


def test_only_real_loads_count_as_load_time(metrics: Metrics) -> None:
    for result in ("loaded", "replaced", "unchanged", "refused", "failed"):
        metrics.adapter_loaded(result, 0.5)
    assert value(metrics, "vllm:lora_adapter_load_seconds_count") == 2
    assert value(metrics, "loramux:adapter_loads_total", result="refused") == 1


def test_residency_is_asked_for_at_each_scrape(metrics: Metrics) -> None:
    """Running and waiting are two lists, and a scrape shows the present only."""

    def row(name: str, version: str, *, is_registered: bool = True) -> AdapterResidency:
        return AdapterResidency(
            name=name, version=version, lora_rank=8, is_registered=is_registered, in_flight=name != "idle"
        )

    rows = [row("r", "1"), row("w", "2"), row("both", "3"), row("idle", "3"), row("r", "0", is_registered=False)]
    snapshot = ResidencySnapshot(
        adapters=rows,
        running_versions=frozenset({"1", "3"}),
        waiting_versions=frozenset({"2", "3"}),
        active_versions=frozenset({"1", "3"}),
        max_device_adapters=4,
        updated_at=123.0,
    )
    current = [snapshot]
    metrics.watch_adapters(lambda: current[0])
    labels = {"max_lora": "4", "running_lora_adapters": "both,r", "waiting_lora_adapters": "both,w"}
    assert value(metrics, "vllm:lora_requests_info", **labels) == 123.0
    assert value(metrics, "vllm:num_gpu_loaded_lora_adapters") == 2
    assert value(metrics, "vllm:num_cpu_loaded_lora_adapters") == 4
    assert value(metrics, "vllm:lora_adapter_loaded", adapter_name="w", level="cpu", pinned="false", rank="8") == 1
    current[0] = ResidencySnapshot()
    infos = [key for key in samples(metrics) if key[0] == "vllm:lora_requests_info"]
    assert [dict(key[1])["running_lora_adapters"] for key in infos] == [""]
    assert not [key for key in samples(metrics) if key[0] == "vllm:lora_adapter_loaded"]


def test_memory_is_shown_by_part_beside_what_the_process_has(metrics: Metrics) -> None:
    parts = {"weights": 100, "cpu_loras": 7}
    metrics.watch_memory(lambda: parts)
    assert value(metrics, "loramux:memory_bytes", part="weights") == 100
    parts["cpu_loras"] = 9
    assert value(metrics, "loramux:memory_bytes", part="cpu_loras") == 9
    found = {key[0]: number for key, number in samples(metrics).items()}
    assert sys.platform != "linux" or found["process_resident_memory_bytes"] > 1 << 20
