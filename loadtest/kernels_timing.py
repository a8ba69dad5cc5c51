"""What the machine can do at most, and how long passes over cold data take beside it. Knows no operation.

An operation is a `Case`: calls that together walk over more memory than the last cache holds, so that each finds its
data cold, as in a decode step, where a whole model has gone by since this layer's turn. One reading is one such pass
inside one `ThreadTeam.step`. Every reading stands between readings of the ceilings, so that both meet the same drift.
"""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba.np.numpy_support import carray

from adapters.ops.bf16 import pointer
from adapters.ops.chunk_kernel import chunk_kernel
from adapters.ops.thread_team import KernelArguments, ThreadTeam
from server.engine.recording import record
from server.engine.tensor_arena import TensorArena

_CHUNK = 1 << 18  # bytes that a thread reads or copies at once
_WORDS = _CHUNK // 8
_ASSUMED_CACHE = 32 << 20
_MIN_READING = 0.002  # seconds; a shorter pass is repeated
_PRODUCTS = 5
_FROM, _TO = range(2)


@chunk_kernel(error_model="numpy", boundscheck=False)
def _read(arguments: Any, chunk: Any) -> None:
    """sums[chunk] = Σ words[chunk]: all the memory is read, next to nothing written."""
    fields = carray(pointer(arguments), 2, np.int64)
    words = carray(pointer(fields[_FROM] + chunk * _CHUNK), _WORDS, np.int64)
    total = np.int64(0)
    for i in range(_WORDS):
        total += words[i]
    carray(pointer(fields[_TO] + 8 * chunk), 1, np.int64)[0] = total


@chunk_kernel(error_model="numpy", boundscheck=False)
def _copy(arguments: Any, chunk: Any) -> None:
    """target[chunk] = source[chunk]."""
    fields = carray(pointer(arguments), 2, np.int64)
    source = carray(pointer(fields[_FROM] + chunk * _CHUNK), _WORDS, np.int64)
    target = carray(pointer(fields[_TO] + chunk * _CHUNK), _WORDS, np.int64)
    for i in range(_WORDS):
        target[i] = source[i]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation at one size. The calls differ in their data only."""

    op: str
    shape: str
    size: str
    calls: Sequence[Callable[[], object]]
    num_bytes: float  # that one call must move to and from memory
    flops: float  # of one call
    rows: int
    per_layer: int = 1  # calls of this shape in one layer of the model
    is_decode: bool = True  # a new token a row: the engine plays such steps from a recording

    def emptied(self) -> "Case":
        """Without the calls, and so without their data."""
        return replace(self, calls=())


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one thing, over all rounds."""

    least: float
    median: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Reading":
        return cls(min(values), statistics.median(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Per second, by the team's threads: medians of the rounds in which the operations were timed, and the bests."""

    read_bytes: float
    best_read_bytes: float
    copy_bytes: float  # read plus written
    flops: float  # of torch's bfloat16 matrix product, the best

    def floors(self, case: Case) -> tuple[float, float]:
        """Seconds that one call's bytes and its arithmetic take at least."""
        return case.num_bytes / self.read_bytes, case.flops / self.flops


class Probe:
    """Measures the ceilings again and again, over data that no cache holds."""

    def __init__(self, team: ThreadTeam, num_bytes: int, product_size: int) -> None:
        self._team = team
        self._num_chunks = max(team.num_threads, num_bytes // _CHUNK)
        self._source = np.arange(self._num_chunks * _WORDS, dtype=np.int64)
        self._target = np.zeros_like(self._source)  # written now, so that its pages exist
        self._target[:] = 1
        self._sums = np.zeros(self._num_chunks, np.int64)
        source = self._source.ctypes.data
        self._read_fields = KernelArguments(np.array([source, self._sums.ctypes.data], np.int64))
        self._copy_fields = KernelArguments(np.array([source, self._target.ctypes.data], np.int64))
        self._a, self._b = (torch.randn(product_size, product_size).bfloat16() for _ in range(2))  # [n, n] each

    def read_rate(self) -> float:
        """Bytes per second."""
        seconds = self._seconds(_read.address, self._read_fields)
        first = _WORDS * (_WORDS - 1) // 2
        assert self._sums[0] == first and self._sums[-1] == first + (self._num_chunks - 1) * _WORDS**2
        return self._num_chunks * _CHUNK / seconds

    def copy_rate(self) -> float:
        """Bytes per second, read plus written."""
        seconds = self._seconds(_copy.address, self._copy_fields)
        assert self._target[-1] == self._source[-1]
        return 2 * self._num_chunks * _CHUNK / seconds

    def flop_rate(self) -> float:
        """Of torch's own product, with as many threads as the team has, which sleep meanwhile."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._team.num_threads)
        try:
            self._a @ self._b
            began = time.perf_counter()
            self._a @ self._b
            return float(2 * len(self._a) ** 3 / (time.perf_counter() - began))
        finally:
            torch.set_num_threads(before)

    def _seconds(self, kernel: int, arguments: KernelArguments) -> float:
        with self._team.step():
            began = time.perf_counter()
            self._team.run(kernel, arguments, self._num_chunks)
            return time.perf_counter() - began


def time_cases(cases: Sequence[Case], team: ThreadTeam, probe: Probe, rounds: int) -> tuple[list[Reading], Ceilings]:
    """Seconds a call of every case, and the ceilings of the same rounds; everything once before, to warm up."""
    times: list[list[float]] = [[] for _ in cases]
    reads, copies = [], []
    # The best, not the median: OpenMP's threads wait for one another by spinning, and lose a core now and then.
    flops = max(probe.flop_rate() for _ in range(_PRODUCTS))
    passes = [_Pass(case, team) for case in cases]
    for _ in range(rounds):
        for each, readings in zip(passes, times, strict=True):
            reads.append(probe.read_rate())
            readings.append(each.seconds())
        copies.append(probe.copy_rate())
    ceilings = Ceilings(
        read_bytes=statistics.median(reads),
        best_read_bytes=max(reads),
        copy_bytes=statistics.median(copies),
        flops=flops,
    )
    return [Reading.of(readings) for readings in times], ceilings


class _Pass:
    """All calls of a case, one after the other, as the engine makes them: by Python, or played from a recording."""

    def __init__(self, case: Case, team: ThreadTeam) -> None:
        self._calls, self._team = case.calls, team
        self._run: Callable[[], object] = self._call_all
        if case.is_decode:
            with team.step():
                _, recording = record(self._call_all, team, TensorArena())
            self._run = recording.play
        self._repeats = 1
        self.seconds()  # warms up
        self._repeats = max(1, round(_MIN_READING / (self.seconds() * len(self._calls))))

    def seconds(self) -> float:
        """Per call, of so many passes that the clock can tell."""
        with self._team.step():
            began = time.perf_counter()
            for _ in range(self._repeats):
                self._run()
            return (time.perf_counter() - began) / (self._repeats * len(self._calls))

    def _call_all(self) -> torch.Tensor:
        for call in self._calls:
            call()
        return torch.empty(0)


def last_cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """All last-level caches of the machine together; 32 MiB where the system does not tell."""
    sizes: dict[tuple[int, str], int] = {}
    for folder in root.glob("cpu[0-9]*/cache/index*"):
        try:
            level, shared, size = (folder.joinpath(n).read_text().strip() for n in ("level", "shared_cpu_list", "size"))
        except OSError:
            continue
        if number := re.fullmatch(r"(\d+)K", size):
            sizes[int(level), shared] = int(number.group(1)) << 10
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last and last >= 3) or _ASSUMED_CACHE
