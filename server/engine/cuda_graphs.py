"""The decode forward recorded once per batch bucket and replayed: with LoRA, for base rows only, and with LoRA where
outputs of linears and norms are scaled and shifted too.

A graph of a bucket serves any number of rows up to it and any mix of adapters, since everything that varies lies in
the bucket's staged words. What has no graph runs eagerly. Knows no model: `run` is given, and the device's recording
is behind a small protocol.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_NUM_WARM_UPS = 2  # the first compiles kernels and makes workspaces, which may not happen while recording


class Graph(Protocol):
    """A recorded run."""

    def replay(self) -> Tensor:
        """Run again on what the static buffers hold now; the result's memory is the graph's, until any next replay."""


class GraphBackend(Protocol):
    """What can record a run on the device's stream."""

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """Run `run` to warm up, then record it once. Whatever the device refuses is raised."""


@dataclass(frozen=True, slots=True)
class _CUDAGraph:
    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output


class CUDAGraphBackend:
    """torch.cuda.CUDAGraph; all graphs share one memory pool, since one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None  # a handle, made by the first capture

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()
        self._pool = graph.pool()
        return _CUDAGraph(graph, output)


@dataclass(frozen=True, slots=True)
class Bucket:
    """`num_rows` rows of one new token each, with LoRA applied in every group of linears or not at all; the affine
    operation, in every group and norm or not at all, comes with LoRA only."""

    num_rows: int
    has_lora: bool
    has_affine: bool = False

    @property
    def kind(self) -> str:
        if self.has_affine:
            return "with LoRA and affine vectors"
        return "with LoRA" if self.has_lora else "of base rows"


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then every 16 to 64 and every 32 beyond, up to `max_num_seqs` and that itself."""
    steps = [1, 2, 4, 8, *range(16, 64, 16), *range(64, max_num_seqs, 32)]
    return (*(size for size in steps if size < max_num_seqs), max_num_seqs)


@dataclass(slots=True)
class DecodeGraphs:
    """The graphs of all `sizes`. `prepare` fills a bucket's static buffers with a batch that does nothing; `run`
    executes the forward pass on what they hold."""

    backend: GraphBackend
    sizes: Sequence[int]  # rising
    prepare: Callable[[Bucket], None]
    run: Callable[[Bucket], Tensor]
    time_limit: float = 30.0  # seconds
    clock: Callable[[], float] = time.monotonic
    seconds: float = 0.0  # that capturing took
    _graphs: dict[Bucket, Graph] = field(default_factory=dict)

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def capture(self, *, with_lora: bool = True) -> None:
        """Record as many as fit the time limit: those that few steps need, of affine vectors, last; of each kind the
        largest first, as they serve every smaller step too. The clock starts after the largest have run once: how long
        kernels take to compile is the compiler's cache's affair.

        A failure leaves what was recorded before it in use and is logged with its reason.
        """
        sizes = [*reversed(self.sizes)]
        buckets = [Bucket(size, has_lora) for size in sizes for has_lora in ((True, False) if with_lora else (False,))]
        if with_lora:
            buckets += [Bucket(size, True, has_affine=True) for size in sizes]
        self._run_once([bucket for bucket in buckets if bucket.num_rows == sizes[0]])
        began = self.clock()
        for bucket in buckets:
            if self.seconds >= self.time_limit:
                logger.warning(
                    "%d of %d decode graphs were captured in %.1f s, the limit; the first without is that %s for %d "
                    "rows: its steps use a larger graph of their kind, or run eagerly where there is none",
                    self.num_graphs, len(buckets), self.seconds, bucket.kind, bucket.num_rows,
                )  # fmt: skip
                return
            if not self._capture(bucket):
                return
            self.seconds = self.clock() - began
        logger.info("captured %d decode graphs for %s rows in %.1f s", self.num_graphs, list(self.sizes), self.seconds)

    def find(self, num_rows: int, *, has_lora: bool, has_affine: bool = False) -> tuple[int, Graph] | None:
        """The graph of the smallest bucket that holds `num_rows`, and its size; None = run eagerly."""
        for size in self.sizes:
            graph = self._graphs.get(Bucket(size, has_lora, has_affine)) if size >= num_rows else None
            if graph is not None:
                return size, graph
        return None

    def _run_once(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            self.prepare(bucket)
            self.run(bucket)

    def _capture(self, bucket: Bucket) -> bool:
        try:
            self.prepare(bucket)
            self._graphs[bucket] = self.backend.capture(lambda: self.run(bucket))
        except Exception as error:
            logger.warning(
                "decode graph %s for %d rows was not captured, steps without a graph run eagerly and slower: %s: %s",
                bucket.kind, bucket.num_rows, type(error).__name__, error,
            )  # fmt: skip
            return False
        return True
