"""A recorded pass gives on other numbers what the pass itself would give, or refuses to be recorded."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numba import carray
from torch import Tensor
from torch.nn import functional

from adapters.ops.bf16 import pointer
from adapters.ops.chunk_kernel import chunk_kernel
from adapters.ops.thread_team import KernelArguments, ThreadTeam, watched_kernels
from server.engine.recording import NotRecordable, Recording, record
from server.engine.tensor_arena import TensorArena


@chunk_kernel()
def _square(arguments, chunk):  # type: ignore[no-untyped-def]
    """out[chunk] = x[chunk]², float32."""
    fields = carray(pointer(arguments), 2, np.int64)
    x = carray(pointer(fields[1] + 4 * chunk), 1, np.float32)
    carray(pointer(fields[0] + 4 * chunk), 1, np.float32)[0] = x[0] * x[0]


@pytest.fixture
def team() -> Iterator[ThreadTeam]:
    team = ThreadTeam(2)
    yield team
    team.close()


def square(team: ThreadTeam, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    team.run(_square.address, KernelArguments(np.array([out.data_ptr(), x.data_ptr()])), x.numel())
    return out


def check(run: Callable[[Tensor], Tensor], team: ThreadTeam, x: Tensor, *others: Tensor) -> Recording:
    """Record `run` on x, and play it on the others."""
    arena, given = TensorArena(), x.clone()
    with torch.inference_mode(), team.step():
        found, recording = record(lambda: run(given), team, arena)
        assert torch.equal(found, run(x))
        for other in (*others, x):
            given.copy_(other)
            assert torch.equal(recording.play(), run(other.clone()))
    return recording


X = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])


def test_kernels_and_operations_play_in_their_order(team: ThreadTeam) -> None:
    def run(x: Tensor) -> Tensor:
        y = square(team, x)
        y = y + x
        y = square(team, (y @ y.T).contiguous())
        return functional.softmax(y, -1)

    recording = check(run, team, X, X * 3, X - 7)
    assert recording.num_kernels == 3, "two squares and the sum"
    assert recording.num_operations == 2, "the product and the softmax"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_our_sum_has_the_bits_of_torch_s(team: ThreadTeam, dtype: torch.dtype) -> None:
    x = torch.randn(9, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    recording = check(lambda x: x + x.flip(0), team, x, x * 1e30, x * 1e-30)
    assert recording.num_kernels == 1
    with torch.inference_mode(), team.step():
        extreme = torch.tensor([[torch.inf, torch.nan, -torch.inf, 0.0, -0.0]]).to(dtype)
        found, _ = record(lambda: extreme + extreme, team, TensorArena())
    assert torch.equal(found.nan_to_num(7.0), (extreme + extreme).nan_to_num(7.0))


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x + 1,
        lambda x: x + x[:1],
        lambda x: torch.add(x, x, alpha=2),
        lambda x: x.T + x.T,
        lambda x: (x + x).mul_(2).add_(x),
        lambda x: torch.cat([x, x * 2])[1:3].T.contiguous(),
        lambda x: x.max(-1).values,
        lambda x: torch.empty(2, 3).copy_(x).view(3, 2).relu_(),
        lambda x: x[torch.tensor([1, 0])] * torch.arange(3),
        lambda x: x.to(torch.bfloat16).to(torch.float64),
        lambda x: torch.zeros(3, 3).index_copy_(0, torch.tensor([2, 0]), x),
        lambda x: x.new_full((2, 2), 3.0) @ x,
        lambda x: torch.stack(x.unbind(0)[::-1]),
        lambda x: functional.dropout(x, 0.5, training=False) * 2,
    ],
)
def test_any_operation_may_stand_between(team: ThreadTeam, run: Callable[[Tensor], Tensor]) -> None:
    check(run, team, X, X * 3 + 1)


def test_a_place_used_twice_in_a_pass_is_used_twice_again(team: ThreadTeam) -> None:
    def run(x: Tensor) -> Tensor:
        for _ in range(50):
            x = square(team, x) * 0.5 + x * 0.1
        return x

    arena, given = TensorArena(), X.clone()
    with torch.inference_mode(), team.step():
        found, recording = record(lambda: run(given), team, arena)
        expected = found.clone()
        assert torch.equal(recording.play(), expected)
    assert sum(arena._used) < 1 << 12, "fifty times three tensors of 24 bytes lie in a few places of 128"


def test_two_recordings_share_the_memory(team: ThreadTeam) -> None:
    arena, given = TensorArena(), X.clone()
    with torch.inference_mode(), team.step():
        _, first = record(lambda: square(team, given) + given, team, arena)
        size = arena.num_bytes
        _, second = record(lambda: (square(team, given[:1]) * 2).relu(), team, arena)
        assert arena.num_bytes == size
        for recording, expected in ((first, X * X + X), (second, (X[:1] * X[:1] * 2).relu()), (first, X * X + X)):
            assert torch.equal(recording.play(), expected)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x * x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: torch.rand_like(x),
        lambda x: functional.dropout(x, 0.5),
        lambda x: torch.where(x > 0)[0],
        lambda x: x.repeat_interleave(torch.tensor([1, 2]), 0),
        lambda x: x.narrow(0, torch.tensor(1), 1),
        lambda x: torch.tensor_split(x, torch.tensor([1]))[0],
    ],
)
def test_what_depends_on_values_is_refused(team: ThreadTeam, run: Callable[[Tensor], Tensor]) -> None:
    with torch.inference_mode(), pytest.raises(NotRecordable, match="asks a tensor for its value"):
        record(lambda: run(X), team, TensorArena())
    with watched_kernels(lambda *_: None):  # a refused recording watches nothing any more
        square(team, X)


def test_another_thread_s_kernels_are_not_recorded(team: ThreadTeam) -> None:
    noted: list[int] = []
    with watched_kernels(lambda _kernel, _arguments, num_chunks: noted.append(num_chunks)):
        from_outside = _in_a_thread(lambda: square(team, X))
        square(team, X[:1])
    assert torch.equal(from_outside, X * X) and noted == [3]


def test_kernels_of_every_team_are_recorded(team: ThreadTeam) -> None:
    other = ThreadTeam(1)
    recording = check(lambda x: square(other, square(team, x)), team, X, X + 1)
    assert recording.num_kernels == 2


def _in_a_thread(run: Callable[[], Tensor]) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]
