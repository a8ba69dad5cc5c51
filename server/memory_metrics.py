"""Where the memory goes: what each part was given or holds, beside what the process has. Knows nothing of the parts."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class MemoryCollector(Collector):
    """`loramux:memory_bytes`, asked for at each scrape. `parts` gives bytes by name."""

    def __init__(self, model_name: str, parts: Callable[[], Mapping[str, int]]) -> None:
        self._model_name = model_name
        self._parts = parts

    def collect(self) -> Iterable[Metric]:
        gauge = GaugeMetricFamily("loramux:memory_bytes", "Bytes by part.", None, ("model_name", "part"))
        for part, num_bytes in self._parts().items():
            gauge.add_metric((self._model_name, part), num_bytes)
        yield gauge
