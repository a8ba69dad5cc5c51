"""Prometheus series about adapters: requests by adapter under a bounded number of names, and who is resident where.

Knows nothing of requests, HTTP or files. Names are the clients' names for adapters; the base model counts under its
own served name, which no adapter may have. A series of its own costs memory here and in Prometheus, so at most
`max_adapters` names have one at a time: a name takes a free place when it is first active, keeps it until it is
unloaded, and may lose it to another name once it has been idle for `IDLE_SECONDS`. All others share `adapter="other"`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

OTHER = "other"
ENGINE = "0"  # the label vLLM numbers its engines by; its dashboards filter and group by it, and here is one
IDLE_SECONDS = 600.0
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class AdapterChildren:
    """The series one request writes to, looked up once. After the name is dropped they are written to in vain."""

    count_end: Callable[[str], None]  # counts one request, given its finish reason
    prompt_tokens: Counter
    generation_tokens: Counter
    time_to_first_token: Histogram
    e2e_latency: Histogram


class AdapterSeries:
    """The series that carry an `adapter` label, and which names have some of their own."""

    def __init__(
        self, model_name: str, registry: CollectorRegistry, *, max_adapters: int, clock: Callable[[], float]
    ) -> None:
        self._model_name = model_name
        self._max_adapters = max_adapters
        self._clock = clock
        self._last_active: dict[str, float] = {}  # name -> seconds; only names with series of their own
        labels = ("model_name", "adapter")
        self._requests = Counter(
            "loramux:adapter_requests", "Requests ended.", (*labels, "finished_reason"), registry=registry
        )
        self._tokens = Counter(
            "loramux:adapter_tokens", "Tokens of prompts and outputs.", (*labels, "direction"), registry=registry
        )
        self._ttft = Histogram(
            "loramux:adapter_time_to_first_token_seconds",
            "Arrival to first token.",
            labels,
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._e2e = Histogram(
            "loramux:adapter_e2e_request_latency_seconds",
            "Arrival to end.",
            labels,
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )

    def children(self, adapter: str | None) -> AdapterChildren:
        """The series for a request that names `adapter` (None = the base model); marks the name as active."""
        label = self._model_name if adapter is None else self._label(adapter)
        return AdapterChildren(
            count_end=lambda reason: self._count_end(adapter, label, reason),
            prompt_tokens=self._tokens.labels(self._model_name, label, "prompt"),
            generation_tokens=self._tokens.labels(self._model_name, label, "generation"),
            time_to_first_token=self._ttft.labels(self._model_name, label),
            e2e_latency=self._e2e.labels(self._model_name, label),
        )

    def _count_end(self, adapter: str | None, label: str, reason: str) -> None:
        """The reason is known only now; a name dropped meanwhile must not come back to life by it."""
        if label in (OTHER, self._model_name) or adapter in self._last_active:
            self._requests.labels(self._model_name, label, reason).inc()

    def drop(self, adapter: str) -> None:
        """Forget the name's own series. Requests of it still running write to nothing anybody reads."""
        if self._last_active.pop(adapter, None) is not None:
            for metric in (self._requests, self._tokens, self._ttft, self._e2e):
                metric.remove_by_labels({"model_name": self._model_name, "adapter": adapter})

    def _label(self, adapter: str) -> str:
        if adapter == OTHER:
            return OTHER
        now = self._clock()
        if adapter not in self._last_active and len(self._last_active) >= self._max_adapters:
            self._drop_idle(now)
        if adapter in self._last_active or len(self._last_active) < self._max_adapters:
            self._last_active[adapter] = now
            return adapter
        return OTHER

    def _drop_idle(self, now: float) -> None:
        for name in [name for name, last in self._last_active.items() if now - last > IDLE_SECONDS]:
            self.drop(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterResidency:
    """One name (or, when not registered, one draining version that was reached by the name) at the last step."""

    name: str
    version: str
    lora_rank: int
    is_registered: bool
    in_flight: bool  # requests that came by this name hold the version
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencySnapshot:
    """What the engine and the registry hold, asked for at each scrape."""

    adapters: Sequence[AdapterResidency] = ()
    running_versions: frozenset[str] = frozenset()
    waiting_versions: frozenset[str] = frozenset()
    active_versions: frozenset[str] = frozenset()
    max_device_adapters: int = 0
    updated_at: float = 0.0  # seconds, Unix time, of the engine's last step

    def names_in_flight(self, versions: frozenset[str]) -> str:
        """The names, comma-joined, under which requests of `versions` came in."""
        return ",".join(sorted({a.name for a in self.adapters if a.in_flight and a.version in versions}))


class ResidencyCollector(Collector):
    """Writes the gauges that gateways route by, from a fresh snapshot at each scrape, so that no series goes stale."""

    def __init__(self, model_name: str, snapshot: Callable[[], ResidencySnapshot]) -> None:
        self._model_name = model_name
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        snapshot = self._snapshot()
        yield self._requests_info(snapshot)
        yield self._loaded(snapshot)
        held = {adapter.version for adapter in snapshot.adapters}
        yield self._count(
            "num_gpu_loaded_lora_adapters", "Versions in the device pools.", len(snapshot.active_versions)
        )
        yield self._count("num_cpu_loaded_lora_adapters", "Versions in host memory.", len(held))
        yield self._count("max_gpu_lora_adapters", "Versions one step can use.", snapshot.max_device_adapters)

    def _requests_info(self, snapshot: ResidencySnapshot) -> Metric:
        labels = ("model_name", "engine", "max_lora", "running_lora_adapters", "waiting_lora_adapters")
        info = GaugeMetricFamily(
            "vllm:lora_requests_info", "Names of adapters in use; the value is Unix time.", None, labels
        )
        running = snapshot.names_in_flight(snapshot.running_versions)
        waiting = snapshot.names_in_flight(snapshot.waiting_versions)
        values = (self._model_name, ENGINE, str(snapshot.max_device_adapters), running, waiting)
        info.add_metric(values, snapshot.updated_at)
        return info

    def _loaded(self, snapshot: ResidencySnapshot) -> Metric:
        labels = ("model_name", "engine", "adapter_name", "level", "pinned", "rank")
        loaded = GaugeMetricFamily("vllm:lora_adapter_loaded", "Where each adapter is: gpu or cpu.", None, labels)
        for adapter in snapshot.adapters:
            if adapter.is_registered:
                level = "gpu" if adapter.version in snapshot.active_versions else "cpu"
                pinned = str(adapter.pinned).lower()
                values = (self._model_name, ENGINE, adapter.name, level, pinned, str(adapter.lora_rank))
                loaded.add_metric(values, 1)
        return loaded

    def _count(self, name: str, text: str, value: int) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", text, None, ("model_name", "engine"))
        gauge.add_metric((self._model_name, ENGINE), value)
        return gauge
