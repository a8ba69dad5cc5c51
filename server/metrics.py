"""Prometheus metrics under vLLM's names where it has one, so that its dashboards and gateways work, and our own
under `loramux:`. Knows nothing of HTTP or of the engine's insides: it is told what happened. One registry per
server, never the process-wide one. docs/metrics.md lists every series.

A request is followed by the `RequestMetrics` that `request_started` returns: one `observe` per engine output.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from server.adapter_life_metrics import AdapterLifeCollector, AdapterLifeSnapshot
from server.adapter_metrics import (
    ENGINE,
    LATENCY_BUCKETS,
    LOAD_BUCKETS,
    AdapterSeries,
    ResidencyCollector,
    ResidencySnapshot,
)
from server.engine.request import EngineStats, FinishReason, RequestOutput
from server.memory_metrics import MemoryCollector

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
TOKEN_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
TOKEN_COUNT_BUCKETS = tuple(m * 10**e for e in range(5) for m in (1, 2, 5))  # 1 … 50,000
STEP_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class _Growing:
    """Feeds a counter from a total that the engine keeps, by the difference to what was last seen."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._seen = 0

    def update(self, total: int) -> None:
        if total < self._seen:  # a new engine began to count at zero
            self._seen = 0
        self._counter.inc(total - self._seen)
        self._seen = total


class Metrics:
    """Every series of one server. All calls come from the event loop."""

    def __init__(
        self,
        model_name: str,
        registry: CollectorRegistry | None = None,
        *,
        max_adapters: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a `_created` series beside every counter would double what is scraped
        self.model_name = model_name
        self.registry = CollectorRegistry() if registry is None else registry
        self.clock = clock
        self.adapters = AdapterSeries(model_name, self.registry, max_adapters=max_adapters, clock=clock)
        self.requests = RequestHistograms(self)
        self._steps = StepSeries(self)
        self._last_step_at = time.time()
        self._errors = Counter(
            "loramux:errors", "Replies with an error.", ("model_name", "status", "code"), registry=self.registry
        )
        self._loads = Counter(
            "loramux:adapter_loads", "Adapter loads by outcome.", ("model_name", "result"), registry=self.registry
        )
        self._load_seconds = self.histogram(
            "vllm:lora_adapter_load_seconds", "Reading, checking and handing over one adapter.", LOAD_BUCKETS
        )

    def counter(self, name: str, text: str) -> Counter:
        labels = self._labels(name)
        return Counter(name, text, tuple(labels), registry=self.registry).labels(**labels)

    def gauge(self, name: str, text: str) -> Gauge:
        labels = self._labels(name)
        return Gauge(name, text, tuple(labels), registry=self.registry).labels(**labels)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        labels = self._labels(name)
        return Histogram(name, text, tuple(labels), buckets=buckets, registry=self.registry).labels(**labels)

    def _labels(self, name: str) -> dict[str, str]:
        """What every series of that name carries: vLLM's have its engine number too."""
        engine = {"engine": ENGINE} if name.startswith("vllm:") else {}
        return {"model_name": self.model_name, **engine}

    def observe_step(self, stats: EngineStats) -> None:
        """Take in the engine's numbers after a step (`AsyncEngine.add_observer`)."""
        self._last_step_at = time.time()
        self._steps.observe(stats)

    @property
    def last_step_at(self) -> float:
        """Unix time of the last `observe_step`, seconds."""
        return self._last_step_at

    def request_started(
        self, *, adapter: str | None, num_prompt_tokens: int, arrival_time: float | None = None
    ) -> "RequestMetrics":
        """Follow one admitted engine request (one per choice). `adapter` is the name it came by, None = base;
        `arrival_time` is `Request.arrival_time` (time.monotonic), None = now.
        """
        arrival = self.clock() if arrival_time is None else arrival_time
        return RequestMetrics(self, adapter, num_prompt_tokens=num_prompt_tokens, arrival_time=arrival)

    def adapter_loaded(self, result: str, seconds: float) -> None:
        """One load ended. `result` is loaded, replaced, unchanged, refused or failed."""
        self._loads.labels(self.model_name, result).inc()
        if result in ("loaded", "replaced"):
            self._load_seconds.observe(seconds)

    def adapter_unloaded(self, name: str) -> None:
        """The name is gone: drop its series."""
        self.adapters.drop(name)

    def error(self, status: int, code: str | None) -> None:
        """One reply with an error. `code` is one of the fixed codes of the error classes, never a client's text."""
        self._errors.labels(self.model_name, str(status), code or "none").inc()

    def watch_adapters(self, snapshot: Callable[[], ResidencySnapshot]) -> None:
        """Ask `snapshot` at each scrape for who is resident and in use."""
        self.registry.register(ResidencyCollector(self.model_name, snapshot))

    def watch_memory(self, parts: Callable[[], Mapping[str, int]]) -> None:
        """Publish at each scrape what `parts` says of bytes by name, and what the process has of memory and time."""
        self.registry.register(MemoryCollector(self.model_name, parts))
        ProcessCollector(registry=self.registry)

    def watch_adapter_life(self, snapshot: Callable[[], AdapterLifeSnapshot]) -> None:
        """Ask for states, tiers and waits of adapters at each scrape."""
        self.registry.register(AdapterLifeCollector(self.model_name, snapshot))

    def set_cache_config(self, **labels: Any) -> None:
        """Publish the KV cache's size once, as `vllm:cache_config_info{block_size, num_gpu_blocks, …} 1`."""
        name = "vllm:cache_config_info"
        values = {**self._labels(name), **{key: str(value) for key, value in labels.items()}}
        info = Gauge(name, "The KV cache.", tuple(values), registry=self.registry)
        info.labels(**values).set(1)

    def render(self) -> bytes:
        """All series as Prometheus text, content type `CONTENT_TYPE`."""
        return generate_latest(self.registry)


class StepSeries:
    """What is fed from `EngineStats`."""

    def __init__(self, metrics: Metrics) -> None:
        self._running = metrics.gauge("vllm:num_requests_running", "Requests in the running batch.")
        self._waiting = metrics.gauge("vllm:num_requests_waiting", "Requests waiting for a place in it.")
        self._kv_usage = metrics.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._queries = _Growing(metrics.counter("vllm:prefix_cache_queries", "Tokens looked up."))
        self._hits = _Growing(metrics.counter("vllm:prefix_cache_hits", "Tokens found."))
        self._preemptions = _Growing(metrics.counter("vllm:num_preemptions", "Requests preempted."))
        self._step_adapters = metrics.histogram(
            "loramux:step_adapters", "Distinct adapter versions in one forward pass.", STEP_BUCKETS
        )
        self._step_rows = metrics.histogram("loramux:step_rows", "Requests in one forward pass.", STEP_BUCKETS)
        self._step_tokens = metrics.histogram(
            "loramux:step_tokens", "Tokens computed in one forward pass.", TOKEN_COUNT_BUCKETS
        )

    def observe(self, stats: EngineStats) -> None:
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.kv_usage)
        self._queries.update(stats.prefix_queries)
        self._hits.update(stats.prefix_hits)
        self._preemptions.update(stats.num_preemptions)
        if stats.num_step_rows:
            self._step_adapters.observe(stats.num_step_adapters)
            self._step_rows.observe(stats.num_step_rows)
            self._step_tokens.observe(stats.num_step_tokens)


class RequestHistograms:
    """vLLM's per-request series."""

    def __init__(self, metrics: Metrics) -> None:
        histogram, counter = metrics.histogram, metrics.counter
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens computed or found in the prefix cache.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", LATENCY_BUCKETS)
        self.inter_token = histogram(
            "vllm:inter_token_latency_seconds", "Between two outputs of a request.", TOKEN_LATENCY_BUCKETS
        )
        self.per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per token after the first.",
            TOKEN_LATENCY_BUCKETS,
        )
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", LATENCY_BUCKETS)
        self.queue = histogram("vllm:request_queue_time_seconds", "Arrival to first step.", LATENCY_BUCKETS)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "First step to first token.", LATENCY_BUCKETS)
        self.decode = histogram("vllm:request_decode_time_seconds", "First token to last.", LATENCY_BUCKETS)
        self.inference = histogram("vllm:request_inference_time_seconds", "First step to last token.", LATENCY_BUCKETS)
        self.num_prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens.", TOKEN_COUNT_BUCKETS)
        self.num_generation = histogram("vllm:request_generation_tokens", "Generated tokens.", TOKEN_COUNT_BUCKETS)
        self._success = Counter(
            "vllm:request_success",
            "Requests ended, by reason.",
            ("model_name", "engine", "finished_reason"),
            registry=metrics.registry,
        )
        self._model_name = metrics.model_name
        for reason in FinishReason:
            self.success(reason)

    def success(self, reason: FinishReason) -> Counter:
        return self._success.labels(self._model_name, ENGINE, reason.value)


class RequestMetrics:
    """One request on its way: told of each output, it writes the times that output decides."""

    def __init__(self, metrics: Metrics, adapter: str | None, *, num_prompt_tokens: int, arrival_time: float) -> None:
        self._metrics = metrics
        self._all = metrics.requests
        self._own = metrics.adapters.children(adapter)
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._arrival = arrival_time
        self._first_scheduled: float | None = None
        self._first_token: float | None = None
        self._last_token: float | None = None
        self._is_finished = False

    def observe(self, output: RequestOutput) -> None:
        """Take in one engine output, the terminal one included."""
        if self._first_scheduled is None and output.first_scheduled_time is not None:
            self._first_scheduled = output.first_scheduled_time
        if output.new_token_ids and not self._is_finished:
            self._tokens(len(output.new_token_ids), self._metrics.clock())
        if output.finish_reason is not None:
            self.finish(output.finish_reason)

    def finish(self, reason: FinishReason) -> None:
        """The request ended; call it yourself only when the server ended it (a stop string, a client gone).
        Idempotent: the first call counts.
        """
        if self._is_finished:
            return
        self._is_finished = True
        now = self._metrics.clock()
        if self._first_token is None and reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._count_prompt()  # it was scored, and nothing was to be generated
        self._all.success(reason).inc()
        self._own.count_end(reason.value)
        self._all.e2e.observe(now - self._arrival)
        self._own.e2e_latency.observe(now - self._arrival)
        self._all.num_prompt.observe(self._num_prompt_tokens)
        self._all.num_generation.observe(self._num_tokens)
        self._observe_phases()

    def _tokens(self, num_tokens: int, now: float) -> None:
        if self._last_token is None:
            self._first_token = now
            self._all.ttft.observe(now - self._arrival)
            self._own.time_to_first_token.observe(now - self._arrival)
            self._count_prompt()
        else:
            self._all.inter_token.observe(now - self._last_token)
        self._last_token = now
        self._num_tokens += num_tokens
        self._all.generation_tokens.inc(num_tokens)
        self._own.generation_tokens.inc(num_tokens)

    def _count_prompt(self) -> None:
        self._all.prompt_tokens.inc(self._num_prompt_tokens)
        self._own.prompt_tokens.inc(self._num_prompt_tokens)

    def _observe_phases(self) -> None:
        scheduled, first, last = self._first_scheduled, self._first_token, self._last_token
        if scheduled is not None:
            self._all.queue.observe(max(scheduled - self._arrival, 0.0))
        if first is None or last is None:
            return
        self._all.decode.observe(last - first)
        if self._num_tokens > 1:
            self._all.per_token.observe((last - first) / (self._num_tokens - 1))
        if scheduled is not None:
            self._all.prefill.observe(max(first - scheduled, 0.0))
            self._all.inference.observe(max(last - scheduled, 0.0))
