"""Steps staged in one buffer and replayed by graph, on the CPU: tokens equal those of the plain runner.

The fake graph backend records which function was captured and replays it by calling it again, so that whatever is not
in the static buffers at replay is simply not there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.triton_interpreter import require_triton

require_triton()

from adapters import ops  # noqa: E402
from adapters.ops import gpu, gpu_affine  # noqa: E402
from server.config import CacheConfig, EngineConfig, LoRALimits, SchedulerConfig  # noqa: E402
from server.engine.attention.gpu import GPUAttention  # noqa: E402
from server.engine.cuda_graphs import Bucket, DecodeGraphs, Graph, bucket_sizes  # noqa: E402
from server.engine.device_step import HostBuffer, StepLayout  # noqa: E402
from server.engine.runner_choice import device_runner  # noqa: E402
from tests.engine import staged_reference  # noqa: E402
from tests.equivalence import oracle  # noqa: E402
from tests.equivalence.architectures import save  # noqa: E402
from tests.equivalence.harness import EngineHarness, Squeeze  # noqa: E402

CPU = torch.device("cpu")


@dataclass
class FakeGraph:
    run: Callable[[], Tensor]
    num_replays: int = 0

    def replay(self) -> Tensor:
        self.num_replays += 1
        return self.run()


@dataclass
class FakeGraphBackend:
    """Refuses the capture number `fails_at`."""

    fails_at: int | None = None
    graphs: list[FakeGraph] = field(default_factory=list)

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        if len(self.graphs) == self.fails_at:
            raise RuntimeError("out of memory, planted")
        run()
        self.graphs.append(FakeGraph(run))
        return self.graphs[-1]


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"),
    [(1, (1,)), (3, (1, 2, 3)), (16, (1, 2, 4, 8, 16)), (64, (1, 2, 4, 8, 16, 32, 48, 64)), (100, None)],
)
def test_buckets_rise_to_max_num_seqs(max_num_seqs: int, expected: tuple[int, ...] | None) -> None:
    sizes = bucket_sizes(max_num_seqs)
    assert sizes == (expected or sizes) and list(sizes) == sorted(set(sizes)) and sizes[-1] == max_num_seqs


class _Captures:
    """DecodeGraphs over a run that takes a second of the fake clock."""

    def __init__(self, *, fails_at: int | None = None, time_limit: float = 1000.0) -> None:
        self.now = 0.0
        self.prepared: list[Bucket] = []
        self.graphs = DecodeGraphs(
            FakeGraphBackend(fails_at), (1, 4, 8), self.prepared.append, self._run, time_limit, clock=lambda: self.now
        )

    def _run(self, bucket: Bucket) -> Tensor:
        assert self.prepared[-1] == bucket, "captured over another bucket's words"
        self.now += 1.0
        return torch.zeros(bucket.num_rows, 1)

    def sizes(self, *, has_lora: bool, has_affine: bool = False) -> list[int | None]:
        found = [self.graphs.find(n, has_lora=has_lora, has_affine=has_affine) for n in (1, 2, 4, 5, 8, 9)]
        return [each[0] if each else None for each in found]


def test_the_smallest_bucket_that_holds_the_rows_is_replayed() -> None:
    captures = _Captures()
    captures.graphs.capture()
    assert captures.graphs.num_graphs == 9
    for has_lora, has_affine in ((True, False), (False, False), (True, True)):
        assert captures.sizes(has_lora=has_lora, has_affine=has_affine) == [1, 4, 4, 8, 8, None]
    ran_once, captured = captures.prepared[:3], captures.prepared[3:]
    assert captured[0] == Bucket(8, True), "the largest first: it serves every smaller step"
    assert set(ran_once) == {bucket for bucket in captured if bucket.num_rows == 8}, "not all kinds were compiled first"
    assert [bucket.has_affine for bucket in captured] == [False] * 6 + [True] * 3, "few steps need these"


def test_a_model_without_lora_layers_has_graphs_of_base_rows_alone() -> None:
    captures = _Captures()
    captures.graphs.capture(with_lora=False)
    assert captures.graphs.num_graphs == 3 and captures.sizes(has_lora=False) == [1, 4, 4, 8, 8, None]


def test_capture_stops_at_its_time_limit_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    captures = _Captures(time_limit=3.0)
    captures.graphs.capture()
    assert captures.sizes(has_lora=True) == [4, 4, 4, 8, 8, None]
    assert captures.sizes(has_lora=False) == [8, 8, 8, 8, 8, None]
    assert captures.sizes(has_lora=True, has_affine=True) == [None] * 6
    assert "3 of 9 decode graphs were captured in 3.0 s, the limit; the first without is that of base rows for 4" in (
        caplog.text
    )


def test_graphs_of_affine_vectors_are_those_that_time_runs_out_for() -> None:
    captures = _Captures(time_limit=7.0)
    captures.graphs.capture()
    assert captures.sizes(has_lora=True) == captures.sizes(has_lora=False) == [1, 4, 4, 8, 8, None]
    assert captures.sizes(has_lora=True, has_affine=True) == [8, 8, 8, 8, 8, None]


def test_a_refused_capture_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    captures = _Captures(fails_at=2)
    captures.graphs.capture()
    assert captures.sizes(has_lora=True) == [8, 8, 8, 8, 8, None]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "with LoRA for 4 rows was not captured" in caplog.text and "out of memory, planted" in caplog.text


def test_fields_are_aligned_and_apart() -> None:
    layout = StepLayout({"tokens": {"a": 3, "b": 40}, "lora": {"a": 1}})
    words = np.arange(layout.num_words, dtype=np.int32)
    found = [
        layout.host_views("tokens", words)["a"],
        layout.host_views("tokens", words)["b"],
        layout.host_views("lora", words)["a"],
    ]
    assert [(view[0], len(view)) for view in found] == [(0, 3), (32, 40), (96, 1)]
    assert (layout.end_of("tokens"), layout.end_of("lora")) == (96, 128)
    assert layout.device_views("lora", torch.from_numpy(words))["a"].tolist() == [96]


def test_a_host_buffer_grows_and_sends_its_beginning() -> None:
    host = HostBuffer(CPU)
    host.reserve(2)[:] = 7
    words = host.reserve(5)
    words[:] = range(5)
    target = torch.zeros(3, dtype=torch.int32)
    host.send(target)
    assert target.tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The second targets one projection alone, so that groups differ in who is targeted."""
    out = tmp_path_factory.mktemp("adapters")
    return [
        oracle.make_adapter(llama, out / "a", seed=1, r=4, lora_alpha=8, target_modules="all-linear"),
        oracle.make_adapter(llama, out / "b", seed=2, r=8, lora_alpha=16, target_modules=["q_proj"]),
    ]


@dataclass
class Staged:
    """An engine whose steps go through a DeviceRunner on the CPU."""

    harness: EngineHarness
    backend: FakeGraphBackend

    @property
    def num_replays(self) -> int:
        return sum(graph.num_replays for graph in self.backend.graphs)


def _open_staged(llama: Path, *, look_ahead: bool = False, fails_at: int | None = None, triton: bool = False) -> Staged:
    max_num_seqs = 1 if triton else 4  # the interpreter is slow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "select", lambda device: gpu if triton else staged_reference.OPS)
        affine_ops = gpu_affine if triton else staged_reference.AFFINE_OPS
        patch.setattr("adapters.lora_layers.select_affine", lambda device: affine_ops)
        harness = EngineHarness.open(llama, "float32", Squeeze(max_num_seqs=max_num_seqs), look_ahead=look_ahead)
    engine = harness.engine
    engine.base.context.backend = GPUAttention() if triton else staged_reference.attend
    config = EngineConfig(
        cache=CacheConfig(block_size=engine.blocks.block_size),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs),
        lora=LoRALimits(max_lora_rank=8),
    )
    backend = FakeGraphBackend(fails_at)
    runner = device_runner(config, engine.base, engine.adapters.layers, 64, backend)
    runner.capture()
    engine.runner = runner
    return Staged(harness, backend)


def _serve(harness: EngineHarness, folders: list[Path]) -> None:
    """Base rows, both adapters and a composition, coming and going, so that buckets and tails change all the time."""
    versions = [harness.load(folder) for folder in folders]
    prompts = [tuple(range(3 + i, 9 + 2 * i)) for i in range(5)]
    uses = [[], [versions[0]], [versions[1]], [harness.use(versions[0], 0.5), harness.use(versions[1], -0.7)], []]
    for i, (prompt, use) in enumerate(zip(prompts, uses, strict=True)):
        harness.add(str(i), prompt, *use, max_tokens=(3, 12, 6, 9, 16)[i], temperature=0.0 if i % 2 else 0.8, seed=i)
        harness.engine_step()
    harness.run()


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("fails_at", [None, 3, 0])
def test_tokens_equal_the_plain_runner(
    llama: Path, adapters: list[Path], look_ahead: bool, fails_at: int | None
) -> None:
    plain, staged = EngineHarness.open(llama, "float32"), _open_staged(llama, look_ahead=look_ahead, fails_at=fails_at)
    for harness in (plain, staged.harness):
        _serve(harness, adapters)
    assert len({tuple(plain.tokens(str(i))) for i in range(5)}) == 5
    for name in plain.requests:
        assert staged.harness.tokens(name) == plain.tokens(name), name
    assert staged.num_replays == 0 if fails_at == 0 else staged.num_replays >= 10
    if fails_at is None:
        used = [graph.num_replays > 0 for graph in staged.backend.graphs]  # with LoRA and base only, of 4, 2 and 1 rows
        assert sum(used[0:6:2]) >= 2 and sum(used[1:6:2]) >= 1, "few buckets were ever used"
        assert not any(used[6:]), "nobody has affine vectors"


def test_a_larger_bucket_serves_rows_that_compose_adapters(llama: Path, adapters: list[Path]) -> None:
    """One row with two adapters has two entries: the bucket of two rows has room for them, that of one has not."""
    staged = _open_staged(llama)
    harness = staged.harness
    versions = [harness.load(folder) for folder in adapters]
    harness.add("r", range(3, 9), *versions, max_tokens=4)
    harness.run()
    replays = [graph.num_replays for graph in staged.backend.graphs]  # with LoRA and base only, of 4, 2 and 1 rows
    assert replays == [0, 0, 3, 0, 0, 0, *[0] * 3]


def test_triton_kernels_give_the_same_tokens(llama: Path, tmp_path: Path) -> None:
    """One prompt and one token by graph, with an adapter on one projection."""
    adapter = oracle.make_adapter(llama, tmp_path / "a", seed=3, r=4, lora_alpha=8, std=0.5, target_modules=["q_proj"])
    plain, staged = EngineHarness.open(llama, "float32"), _open_staged(llama, triton=True)
    for harness in (plain, staged.harness):
        harness.add("a", range(3, 5), harness.load(adapter), max_tokens=2)
        harness.run()
    assert staged.harness.tokens("a") == plain.tokens("a")
    assert [graph.num_replays for graph in staged.backend.graphs] == [1, 0, 0]
