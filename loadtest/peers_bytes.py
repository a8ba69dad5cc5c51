"""Bytes a decode step must read, and the bandwidth there is to read them with: the limit that a rate is held against.

phi = (W + KV) / (W + KV + D · S_a) is the best LoRA-over-base ratio for anything that reads each adapter once, and
rho = ((W + KV + D · S_a) / bandwidth) / step time says how near a step is to its bytes. Needs numpy and gguf.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from loadtest.peft_adapters import RANK, linear_shapes

_ELEMENT_BYTES = 2  # bfloat16: weights, adapters and cache alike
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"

_PROBE_BYTES = 128 << 20  # an array for each core, far over any cache
_PROBE_REPEATS = 5


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one decode step reads of a base and its adapters."""

    base: int  # W: every linear and the head, once
    kv_per_token: int  # K and V of all layers
    adapter: int  # S_a: A and B of every targeted linear

    @classmethod
    def of(cls, gguf: Path) -> "StepBytes":
        shapes = linear_shapes(gguf)
        kv_elements = 2 * sum(out for name, (_, out) in shapes.items() if name.endswith("k_proj"))
        adapter_elements = RANK * sum(width_in + width_out for width_in, width_out in shapes.values())
        return cls(_base_bytes(gguf), kv_elements * _ELEMENT_BYTES, adapter_elements * _ELEMENT_BYTES)

    def step(self, *, rows: int, context: float, adapters: float) -> float:
        """W + KV + D · S_a."""
        return self.base + rows * context * self.kv_per_token + adapters * self.adapter

    def phi(self, *, rows: int, context: float, adapters: float) -> float:
        without = self.step(rows=rows, context=context, adapters=0)
        return without / self.step(rows=rows, context=context, adapters=adapters)


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second over all cores; a copy moves each byte twice, in and out."""

    read: float
    copy: float

    def __str__(self) -> str:
        return f"read {self.read / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s"


def _base_bytes(gguf: Path) -> int:
    """The matrices a row passes through; an embedding that is not the head as well is a look-up."""
    sizes = {each.name: int(each.n_elements) for each in GGUFReader(gguf).tensors if len(each.shape) == 2}
    if _HEAD in sizes:
        del sizes[_EMBEDDING]
    return sum(sizes.values()) * _ELEMENT_BYTES


def measure_bandwidth() -> Bandwidth:
    """The best of several passes, one thread a core, each over memory of its own."""
    cores = len(os.sched_getaffinity(0))
    sources = [np.ones(_PROBE_BYTES // 8, np.uint64) for _ in range(cores)]
    targets = [np.zeros_like(source) for source in sources]
    with ThreadPoolExecutor(cores) as pool:

        def seconds(work: Callable[[int], object]) -> float:
            start = time.perf_counter()
            list(pool.map(work, range(cores)))
            return time.perf_counter() - start

        read = min(seconds(lambda i: np.bitwise_or.reduce(sources[i])) for _ in range(_PROBE_REPEATS))
        copy = min(seconds(lambda i: np.copyto(targets[i], sources[i])) for _ in range(_PROBE_REPEATS))
    return Bandwidth(cores * _PROBE_BYTES / read, 2 * cores * _PROBE_BYTES / copy)
