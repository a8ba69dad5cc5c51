"""The LoRA operation against float64 loops over ranks, dtypes, adapter popularity, composition and segments."""

import os
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters import ops
from adapters.lora_batch import LoRABatch, RowRanges
from adapters.ops import cpu, reference
from adapters.ops.thread_team import current_team, start_team

IN, OUT, NUM_ADAPTERS, SCALE = 48, 80, 6, 0.2
IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(cpu, id="cpu")]
DTYPES = [torch.float32, torch.bfloat16]
POPULARITY = {
    "distinct": [0, 1, 2, 3, 4, 5],
    "uniform": [3, 1, 4, 1, 5, 0, 2, 2],
    "zipf": [0, 0, 0, 1, 0, 2, 0, 1, 0, 3],
    "identical": [2] * 7,
}


@dataclass
class Pools:
    a: Tensor  # [R, IN]
    b: Tensor  # [R, OUT]
    ranks: np.ndarray  # [R] int32
    starts: list[int]


def make_pools(rank: int, dtype: torch.dtype, *, seed: int = 0) -> Pools:
    """NUM_ADAPTERS adapters of `rank`, one unused row between them. Rows outside the adapters are NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = NUM_ADAPTERS * (rank + 1)
    starts = [i * (rank + 1) for i in range(NUM_ADAPTERS)]
    a = torch.randn(num_rows, IN, generator=generator) * SCALE
    b = torch.randn(num_rows, OUT, generator=generator) * SCALE
    a[rank :: rank + 1] = b[rank :: rank + 1] = float("nan")
    ranks = np.zeros(num_rows, np.int32)
    ranks[starts] = rank
    return Pools(a.to(dtype), b.to(dtype), ranks, starts)


def make_xy(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, IN, generator=generator).to(dtype)
    return x, torch.randn(num_tokens, OUT, generator=generator).to(dtype)


def expected(pools: Pools, y: Tensor, x: Tensor, token_ranges: list[RowRanges]) -> Tensor:
    """y[t] + Σ_e weight_e · (x[t] · Aᵀ) · B in float64, [T, OUT]."""
    out = y.double().clone()
    for t, ranges in enumerate(token_ranges):
        for start, weight in ranges:
            for row in range(start, start + int(pools.ranks[start])):
                shrunk = float((x[t].double() * pools.a[row].double()).sum())
                out[t] += weight * shrunk * pools.b[row].double()
    return out


def assert_rounded_once(got: Tensor, want: Tensor) -> None:
    """Within the error of float32 sums, and half a unit in the last place when `got` is bf16 (8 significant bits)."""
    limit = 1e-5 * (1 + want.abs())
    if got.dtype is torch.bfloat16:
        limit += torch.exp2(torch.frexp(want).exponent.double() - 9)
    assert (got.double() - want).abs().le(limit).all()


def bind(ops_module: ModuleType, pools: Pools) -> ops.BoundLoRA:
    bound: ops.BoundLoRA = ops_module.bind(
        ops.LoRAPools(a_pool=pools.a[None], b_pools=(pools.b,), ranks=torch.from_numpy(pools.ranks)[None])
    )
    return bound


def run(ops_module: ModuleType, pools: Pools, y: Tensor, x: Tensor, batch: LoRABatch | None) -> Tensor:
    assert batch is not None
    y = y.clone()
    bind(ops_module, pools).add([y], x, ops_module.stage(batch))
    return y


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 6, 16, 64])
@pytest.mark.parametrize("popularity", POPULARITY)
def test_rows_equal_the_loops(implementation: ModuleType, dtype: torch.dtype, rank: int, popularity: str) -> None:
    pools = make_pools(rank, dtype)
    ranges: list[RowRanges] = [((pools.starts[i], 1.0 + 0.25 * i),) for i in POPULARITY[popularity]]
    ranges[1:1] = [()]  # a base row in the middle
    x, y = make_xy(len(ranges), dtype)
    batch = LoRABatch.build([1] * len(ranges), ranges, min_segment=len(ranges) + 1)
    got = run(implementation, pools, y, x, batch)
    want = expected(pools, y, x, ranges)
    assert_rounded_once(got, want)
    assert torch.equal(got[1].view(torch.uint8), y[1].view(torch.uint8))
    assert (want - y.double()).abs().amax(1)[0] > 0.1  # the delta is no rounding error


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_composition_sums_with_weights_before_one_rounding(implementation: ModuleType, dtype: torch.dtype) -> None:
    pools = make_pools(8, dtype)
    s = pools.starts
    ranges: list[RowRanges] = [
        ((s[0], 1.0), (s[1], 1.0)),
        ((s[2], 0.5), (s[3], -0.75), (s[4], 2.0)),
        ((s[5], 0.0),),
        ((s[1], -1.0),),
        ((s[0], 1.0), (s[0], -1.0)),
    ]
    x, y = make_xy(len(ranges), dtype)
    got = run(implementation, pools, y, x, LoRABatch.build([1] * 5, ranges, min_segment=9))
    assert_rounded_once(got, expected(pools, y, x, ranges))
    assert torch.equal(got[2], y[2])  # weight 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_of_rank_0_here_leaves_its_rows_alone(implementation: ModuleType, dtype: torch.dtype) -> None:
    pools = make_pools(8, dtype)
    pools.ranks[pools.starts[1]] = 0
    ranges: list[RowRanges] = [((pools.starts[1], 1.0),), ((pools.starts[0], 1.0), (pools.starts[1], 1.0))]
    x, y = make_xy(6, dtype)
    y[:5, 0] = -0.0  # a sum with 0 would turn it into +0.0
    batch = LoRABatch.build([5, 1], ranges, min_segment=4)
    assert batch is not None and batch.segments
    got = run(implementation, pools, y, x, batch)
    assert torch.equal(got[:5].view(torch.uint8), y[:5].view(torch.uint8))
    assert_rounded_once(got, expected(pools, y, x, [ranges[0]] * 5 + [ranges[1]]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 5])
def test_one_delta_is_rounded_to_nearest_even(implementation: ModuleType, dtype: torch.dtype, rank: int) -> None:
    """x · A is 1 for one rank and 0 for the rest, so that every column is one exact sum, many of them ties."""
    pools = make_pools(rank, dtype)
    pools.a[:rank] = 0.0
    pools.a[rank - 1, 0] = 1.0
    pools.b[:rank] = torch.arange(rank * OUT).view(rank, OUT) * 2.0**-9
    x, y = torch.zeros(2, IN, dtype=dtype), torch.full((2, OUT), 1.0, dtype=dtype)
    x[:, 0] = torch.tensor([1.0, -1.0])
    y[0, 3:7] = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.0e38])
    y[0, OUT - 1] = float("nan")
    batch = LoRABatch.build([1, 1], [((pools.starts[0], 1.0),)] * 2, min_segment=9)
    got = run(implementation, pools, y, x, batch)
    want = (y.float() + x[:, :1].float() * pools.b[rank - 1].float()).to(dtype)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert got[0, [5, OUT - 1]].isnan().all()


MIXED: list[tuple[int, list[tuple[int, float]]]] = [
    (1, [(0, 1.0)]),
    (1, []),
    (40, [(1, 1.0)]),
    (7, [(1, 0.5)]),
    (33, []),
    (21, [(2, -1.5)]),
    (20, [(3, 1.0), (4, 0.5)]),
    (2, [(5, 1.0)]),
]


def mixed(pools: Pools, min_segment: int) -> tuple[list[RowRanges], LoRABatch]:
    ranges = [tuple((pools.starts[i], weight) for i, weight in adapters) for _, adapters in MIXED]
    counts = [count for count, _ in MIXED]
    batch = LoRABatch.build(counts, ranges, min_segment=min_segment)
    assert batch is not None
    return [r for count, r in zip(counts, ranges, strict=True) for _ in range(count)], batch


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rank", [1, 3, 16, 64])
def test_segments_and_rows_together_in_float32(implementation: ModuleType, rank: int) -> None:
    pools = make_pools(rank, torch.float32)
    token_ranges, batch = mixed(pools, min_segment=16)
    assert len(batch.segments) == 2 and len(batch.rows) == 30
    x, y = make_xy(len(token_ranges), torch.float32)
    got = run(implementation, pools, y, x, batch)
    assert_rounded_once(got, expected(pools, y, x, token_ranges))
    is_base = torch.tensor([not ranges for ranges in token_ranges])
    assert torch.equal(got[is_base], y[is_base])


def in_bf16_steps(pools: Pools, y: Tensor, x: Tensor, token_ranges: list[RowRanges]) -> Tensor:
    """What PEFT computes in bf16: every product and sum rounded, [T, OUT]."""
    out = y.clone()
    for t, ranges in enumerate(token_ranges):
        for start, weight in ranges:
            end = start + int(pools.ranks[start])
            out[t] = out[t] + (x[t] @ pools.a[start:end].T @ pools.b[start:end]) * weight
    return out


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
def test_segments_in_bf16_err_at_most_twice_as_much_as_peft(rank: int) -> None:
    pools = make_pools(rank, torch.bfloat16)
    token_ranges, batch = mixed(pools, min_segment=16)
    x, y = make_xy(len(token_ranges), torch.bfloat16)
    want = expected(pools, y, x, token_ranges)
    is_base = torch.tensor([not ranges for ranges in token_ranges])
    got = run(cpu, pools, y, x, batch)
    ours = (got.double() - want)[~is_base].norm()
    peft = (in_bf16_steps(pools, y, x, token_ranges).double() - want)[~is_base].norm()
    assert ours <= 2 * peft
    assert torch.equal(got[is_base].view(torch.int16), y[is_base].view(torch.int16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["packed", "slice of a fused tensor", "transposed", "one row for all"])
def test_layouts_of_x(implementation: ModuleType, dtype: torch.dtype, layout: str) -> None:
    pools = make_pools(8, dtype)
    ranges: list[RowRanges] = [((pools.starts[0], 1.0),), (), ((pools.starts[1], 1.0),)]
    counts = [5, 1, 20]
    x, y = make_xy(26, dtype)
    strided = {
        "packed": x.unsqueeze(0),
        "slice of a fused tensor": torch.cat([x, x + 1], dim=1).unsqueeze(0)[..., :IN],
        "transposed": x.T.contiguous().T,
        "one row for all": x[:1].expand(26, IN),
    }[layout]
    batch = LoRABatch.build(counts, ranges, min_segment=16)
    got = run(implementation, pools, y.unsqueeze(0), strided, batch)[0]
    plain = run(implementation, pools, y, strided.reshape(26, IN).contiguous(), batch)
    assert torch.equal(got, plain)


def test_threads_change_no_bit() -> None:
    """Each token is one chunk, so it cannot show who computed it."""
    pools = make_pools(16, torch.bfloat16)
    ranges: list[RowRanges] = [((pools.starts[i % NUM_ADAPTERS], 1.0),) for i in range(101)]
    x, y = make_xy(101, torch.bfloat16)
    batch = LoRABatch.build([1] * 101, ranges, min_segment=999)
    alone = run(cpu, pools, y, x, batch)
    before = current_team().num_threads
    try:
        with start_team(3).step():
            assert torch.equal(run(cpu, pools, y, x, batch), alone)
    finally:
        start_team(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_modules_that_read_one_input_are_served_at_once(implementation: ModuleType, dtype: torch.dtype) -> None:
    """Three modules with outputs of their own; the adapter targets the first and the last."""
    generator = torch.Generator().manual_seed(5)
    widths, rank, starts = (80, 16, 48), 4, (0, 6)
    a = (torch.randn(3, 12, IN, generator=generator) * SCALE).to(dtype)
    bs = tuple((torch.randn(12, width, generator=generator) * SCALE).to(dtype) for width in widths)
    ranks = torch.zeros(3, 12, dtype=torch.int32)
    ranks[0, list(starts)] = ranks[2, list(starts)] = rank
    x = torch.randn(5, IN, generator=generator).to(dtype)
    ys = [torch.randn(5, width, generator=generator).to(dtype) for width in widths]
    ranges: list[RowRanges] = [((0, 1.0),), (), ((6, 0.5), (0, -1.0)), ((6, 2.0),), ()]
    batch = LoRABatch.build([1] * 5, ranges, min_segment=99)
    got = [y.clone() for y in ys]
    implementation.bind(ops.LoRAPools(a, bs, ranks)).add(got, x, implementation.stage(batch))
    assert torch.equal(got[1], ys[1])
    for module in (0, 2):
        pools = Pools(a[module], bs[module], ranks[module].numpy(), list(starts))
        want = expected(pools, ys[module], x, ranges)
        assert_rounded_once(got[module], want)
        assert torch.equal(got[module][[1, 4]], ys[module][[1, 4]]) and not torch.equal(got[module], ys[module])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_of_other_tokens_is_refused_and_y_kept(implementation: ModuleType) -> None:
    pools = make_pools(4, torch.float32)
    x, y = make_xy(3, torch.float32)
    before = y.clone()
    batch = LoRABatch.build([1, 1], [((0, 1.0),), ()], min_segment=2)
    assert batch is not None
    with pytest.raises(RuntimeError, match="LoRA batch of 2 tokens met x"):
        bind(implementation, pools).add([y], x, implementation.stage(batch))
    assert torch.equal(y, before)


def test_cpu_refuses_what_it_cannot_read() -> None:
    pools = make_pools(4, torch.float32)
    with pytest.raises(ValueError, match="float16"):
        bind(cpu, Pools(pools.a.half(), pools.b.half(), pools.ranks, pools.starts))
    with pytest.raises(ValueError, match="contiguous"):
        bind(cpu, Pools(pools.a.T.contiguous().T, pools.b, pools.ranks, pools.starts))
    x, y = make_xy(1, torch.float32)
    batch = LoRABatch.build([1], [((0, 1.0),)], min_segment=2)
    assert batch is not None
    with pytest.raises(RuntimeError, match="bfloat16"):
        bind(cpu, pools).add([y], x.bfloat16(), cpu.stage(batch))


def test_select_takes_the_kernels_on_cpu_and_the_reference_elsewhere() -> None:
    assert ops.select(torch.device("cpu")) is cpu
    assert ops.select(torch.device("meta")) is reference


ODD_RANK_PROGRAM = """
import sys, torch
from adapters.lora_batch import LoRABatch
from adapters.ops import cpu, reference
from adapters.ops.interface import LoRAPools
torch.manual_seed(0)
for rank, width in ((1, 64), (3, 576), (129, 1536)):
    a, b = torch.full((1, rank + 1, 64), torch.nan), torch.full((rank + 1, width), torch.nan)
    a[0, :rank], b[:rank] = torch.randn(rank, 64) * 0.1, torch.randn(rank, width) * 0.1
    ranks = torch.zeros(1, rank + 1, dtype=torch.int32)
    ranks[0, 0] = rank
    pools = LoRAPools(a.bfloat16(), (b.bfloat16(),), ranks)
    x, batch = torch.randn(40, 64).bfloat16(), LoRABatch.build([40], [((0, 1.0),)], min_segment=2)
    got, want = torch.zeros(40, width).bfloat16(), torch.zeros(40, width).bfloat16()
    cpu.bind(pools).add([got], x, cpu.stage(batch))
    reference.bind(pools).add([want], x, batch)
    assert float((got - want).abs().max()) <= 0.03 * float(want.abs().max()), (rank, width)
print("equal")
"""


@pytest.mark.parametrize("setting", ["MALLOC_MMAP_THRESHOLD_=65536", "GLIBC_TUNABLES=glibc.malloc.perturb=165"])
def test_an_odd_rank_reads_neither_the_next_row_nor_freed_memory(setting: str) -> None:
    """In a process whose freed memory is unmapped or overwritten at once."""
    name, _, value = setting.partition("=")
    environment = {**os.environ, name: value}
    ran = subprocess.run([sys.executable, "-c", ODD_RANK_PROGRAM], env=environment, capture_output=True, text=True)
    assert ran.stdout.strip() == "equal", (ran.returncode, ran.stderr[-2000:])
