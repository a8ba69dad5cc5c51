"""Prometheus series about where adapters lie and how they move: states, tiers, waits. Knows nothing of how any of it
is done; it is given the numbers at each scrape.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLifeSnapshot:
    """Counts grow for ever, but for `states` and `free_rows`."""

    states: Mapping[str, int] = field(default_factory=dict)  # state → names and draining versions in it
    host_hits: int = 0
    host_misses: int = 0
    host_evictions: int = 0
    device_evictions: int = 0
    activations: int = 0
    loads: int = 0
    failed_loads: int = 0
    load_seconds: float = 0.0
    waits: int = 0
    wait_seconds: float = 0.0
    timeouts: int = 0
    free_rows: int = 0


class AdapterLifeCollector(Collector):
    def __init__(self, model_name: str, snapshot: Callable[[], AdapterLifeSnapshot]) -> None:
        self._model_name = model_name
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        now = self._snapshot()
        yield self._gauge("adapters", "Adapters by state.", "state", now.states)
        yield self._gauge(
            "lora_rows_free", "Rows of the device pools that no adapter holds.", None, {"": now.free_rows}
        )
        tiers = {"host": now.host_evictions, "device": now.device_evictions}
        yield self._counter("adapter_evictions", "Adapters that made room for others, by tier.", "tier", tiers)
        asked = {"hit": now.host_hits, "miss": now.host_misses}
        yield self._counter(
            "adapter_host_requests", "Requests whose adapter was in host memory, or not.", "result", asked
        )
        cold = {"loaded": now.loads, "failed": now.failed_loads}
        yield self._counter("adapter_cold_loads", "Adapters read into host memory for a request.", "result", cold)
        for name, text, value in (
            ("adapter_activations", "Copies of an adapter into the device pools.", now.activations),
            ("adapter_cold_load_seconds", "Reading them took so long in all.", now.load_seconds),
            ("adapter_room_waits", "Requests that queued for room in host memory.", now.waits),
            ("adapter_room_wait_seconds", "They waited so long in all.", now.wait_seconds),
            ("adapter_room_timeouts", "Requests that waited in vain.", now.timeouts),
        ):
            yield self._counter(name, text, None, {"": value})

    def _gauge(self, name: str, text: str, label: str | None, values: Mapping[str, float]) -> Metric:
        gauge = GaugeMetricFamily(f"loramux:{name}", text, None, _labels(label))
        for value_of, value in values.items():
            gauge.add_metric(self._values(label, value_of), value)
        return gauge

    def _counter(self, name: str, text: str, label: str | None, values: Mapping[str, float]) -> Metric:
        counter = CounterMetricFamily(f"loramux:{name}", text, None, _labels(label))
        for value_of, value in values.items():
            counter.add_metric(self._values(label, value_of), value)
        return counter

    def _values(self, label: str | None, value_of: str) -> tuple[str, ...]:
        return (self._model_name,) if label is None else (self._model_name, value_of)


def _labels(label: str | None) -> tuple[str, ...]:
    return ("model_name",) if label is None else ("model_name", label)
