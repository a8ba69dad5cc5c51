"""How long work takes on a device, and what the device can do at most. Medians; on the CPU by the clock."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Device:
    """Times calls on `device`. `repeats` calls go into one reading, `rounds` readings into a median."""

    device: torch.device
    rounds: int
    repeats: int

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds per call of `repeats` calls one after the other; the device's time where it is the slower."""
        self.synchronize()
        began = time.perf_counter()
        for _ in range(self.repeats):
            call()
        self.synchronize()
        return (time.perf_counter() - began) / self.repeats

    def interleaved(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Name → median seconds: every call once to warm up, then all in turns, so that drift meets all alike."""
        for call in calls.values():
            call()
        readings: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name, call in calls.items():
                readings[name].append(self.seconds(call))
        return {name: statistics.median(values) for name, values in readings.items()}

    def graphed(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median seconds of one of `calls`, run one after the other in a graph, so that launches cost nothing.

        Several calls over different data keep the cache from answering for the memory."""
        if not self.is_cuda:
            return statistics.median(self.seconds(call) for call in calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        return statistics.median(self.seconds(graph.replay) for _ in range(self.rounds)) / len(calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Measured in this process."""

    bytes_per_second: float  # device-to-device copy, read plus written
    flops_per_second: float  # bf16 matrix product, random data

    def floor(self, num_bytes: float, flops: float) -> float:
        """Seconds that no program runs below."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def measure_ceilings(device: Device, *, tiny: bool) -> Ceilings:
    num_values, n = (1 << 16, 64) if tiny else (1 << 31, 8192)
    source = torch.randn(num_values // 64, device=device.device).to(torch.bfloat16).repeat(64)
    target = torch.empty_like(source)
    copy = device.interleaved({"copy": lambda: target.copy_(source)})["copy"]
    a, b = (torch.randn(n, n, device=device.device).to(torch.bfloat16) for _ in range(2))
    product = device.interleaved({"product": lambda: a @ b})["product"]
    return Ceilings(bytes_per_second=2 * 2 * num_values / copy, flops_per_second=2 * n**3 / product)
