"""The Triton LoRA operation against the reference: on the GPU when there is one, else in Triton's interpreter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.triton_interpreter import DEVICE, require_triton

require_triton()

from adapters.lora_batch import LoRABatch, RowRanges  # noqa: E402
from adapters.ops import gpu, reference  # noqa: E402
from adapters.ops.gpu_batch import GPULoRABatch, LoRACaps, LoRAStaging, fill, from_device, layout  # noqa: E402
from adapters.ops.gpu_blocks import BlockSizes, Split  # noqa: E402
from adapters.ops.interface import LoRAPools  # noqa: E402

IN, OUTS, RANKS, SCALE, MAX_RANK = 150, (48, 80, 130), (1, 4, 8, 16, 64), 0.2, 64
DTYPES = [torch.float32, torch.bfloat16]
# Small enough that the small shapes of these tests take several of each, none of them full.
SMALL = BlockSizes(
    rows=Split(count=3, steps=1, block_k=64),
    tiles=Split(count=2, steps=2, block_k=64),
    row_block_n=128,
    tile_block_n=128,
)
POPULARITY = {
    "distinct": [0, 1, 2, 3, 4],
    "uniform": [3, 1, 4, 1, 0, 2, 2],
    "zipf": [0, 4, 0, 1, 0, 2, 0, 3],
    "identical": [4] * 4,
}


@dataclass(frozen=True)
class Group:
    """Five adapters of ranks 1 to 64, NaN rows between them, in three modules that read one input."""

    pools: LoRAPools
    starts: list[int]

    def bind(self, blocks: BlockSizes | None = SMALL) -> gpu.GPULoRA:
        return gpu.GPULoRA(self.pools, blocks)

    def untarget(self, adapter: int, module: int) -> None:
        self.pools.ranks[module, self.starts[adapter]] = 0

    def one_each(self, adapters: Sequence[int]) -> list[RowRanges]:
        return [((self.starts[i], 1.0 + 0.25 * i),) for i in adapters]


def make_group(dtype: torch.dtype, *, in_features: int = IN, outs: tuple[int, ...] = OUTS) -> Group:
    generator = torch.Generator().manual_seed(1)
    starts = (np.cumsum([0, *RANKS[:-1]]) + np.arange(len(RANKS))).tolist()
    num_rows = sum(RANKS) + len(RANKS)
    a_pool = torch.randn(len(outs), num_rows, in_features, generator=generator) * SCALE
    b_pools = [torch.randn(num_rows, out, generator=generator) * SCALE for out in outs]
    ranks = torch.zeros(len(outs), num_rows, dtype=torch.int32)
    for start, rank in zip(starts, RANKS, strict=True):
        ranks[:, start] = rank
        for pool in (*a_pool, *b_pools):
            pool[start + rank] = torch.nan
    b_pools = [b_pool.to(DEVICE, dtype) for b_pool in b_pools]
    return Group(LoRAPools(a_pool.to(DEVICE, dtype), tuple(b_pools), ranks.to(DEVICE)), starts)


def make_xy(group: Group, num_tokens: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    pools = group.pools
    x, *ys = (torch.randn(num_tokens, width, generator=generator) for width in (pools.in_features, *pools.out_features))
    x, *ys = (tensor.to(DEVICE, pools.a_pool.dtype) for tensor in (x, *ys))
    return ys, x


def rows_of(ranges: Sequence[RowRanges]) -> LoRABatch:
    batch = LoRABatch.build([1] * len(ranges), ranges, min_segment=len(ranges) + 1)
    assert batch is not None
    return batch


def stage(batch: LoRABatch) -> GPULoRABatch:
    return LoRAStaging(max_rank=MAX_RANK).stage(batch, DEVICE)


class Buffer:
    """A bucket as a runner keeps it: one buffer of words, refilled for every step, and one batch over it."""

    def __init__(self, caps: LoRACaps) -> None:
        self.caps, words = caps, list(layout(caps).values())
        self.host = torch.full([sum(words)], 0x7FFFFFFF, dtype=torch.int32)
        self.device = self.host.to(DEVICE, copy=True)
        self._host_views = dict(zip(layout(caps), (part.numpy() for part in self.host.split(words)), strict=True))
        self.batch = from_device(dict(zip(layout(caps), self.device.split(words), strict=True)), caps)
        self.batch.workspace.fill_(torch.nan)

    def load(self, batch: LoRABatch | None) -> GPULoRABatch:
        fill(self._host_views, batch, self.caps)
        self.device.copy_(self.host)
        return self.batch


def run(bound: gpu.GPULoRA, ys: Sequence[Tensor], x: Tensor, staged: GPULoRABatch) -> list[Tensor]:
    ys = [y.clone() for y in ys]
    bound.add(ys, x, staged)
    return ys


def bits(tensors: Sequence[Tensor]) -> list[bytes]:
    return [tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def expected(group: Group, ys: Sequence[Tensor], x: Tensor, batch: LoRABatch) -> list[Tensor]:
    """What the reference gives in float32, not yet rounded."""
    pools, wide = group.pools, [y.to(torch.float32, copy=True) for y in ys]
    b_pools = tuple(b_pool.float() for b_pool in pools.b_pools)
    reference.bind(LoRAPools(pools.a_pool.float(), b_pools, pools.ranks)).add(wide, x.float(), batch)
    return wide


def assert_rounded_once(got: Sequence[Tensor], want: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
    """Within the error of float32 sums, in bf16 of 16 bits of the delta and half a unit in the last of 8 places."""
    for module, (g, w, y) in enumerate(zip(got, want, ys, strict=True)):
        limit = 1e-5 * (1 + w.abs())
        if g.dtype is torch.bfloat16:
            limit += torch.exp2(torch.frexp(w).exponent - 9.0) + (w - y.float()).abs().amax(1, keepdim=True) * 2**-15
        assert (g.float() - w).abs().le(limit).all(), f"module {module}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_rows_of_all_ranks_equal_the_reference(dtype: torch.dtype, popularity: str) -> None:
    group = make_group(dtype)
    ranges = group.one_each(POPULARITY[popularity])
    ranges[1:1] = [()]  # a base row in the middle
    batch, (ys, x) = rows_of(ranges), make_xy(group, len(ranges))
    got, want = run(group.bind(), ys, x, stage(batch)), expected(group, ys, x, batch)
    assert_rounded_once(got, want, ys)
    assert bits([y[1] for y in got]) == bits([y[1] for y in ys])
    for w, y in zip(want, ys, strict=True):
        delta = (w - y.float()).abs().amax(1)
        assert (delta[[0, *range(2, len(ranges))]] > 1e-3).all(), "a delta that is no rounding error"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sizes_that_are_served(dtype: torch.dtype) -> None:
    """With the real blocks: three spans of 256 inputs, outputs over the end of a block, runs of more than one tile."""
    group = make_group(dtype, in_features=576, outs=(300,))
    ranges: list[RowRanges] = [((group.starts[3], 0.5),), ((group.starts[4], 1.0),), ()]
    batch = LoRABatch.build([2, 66, 1], ranges, min_segment=32)
    assert batch is not None
    ys, x = make_xy(group, 69)
    staged = stage(batch)
    assert (staged.caps.num_rows, staged.caps.num_tiles) == (2, 2)
    got = run(group.bind(None), ys, x, staged)
    assert_rounded_once(got, expected(group, ys, x, batch), ys)
    assert bits([got[0][68]]) == bits([ys[0][68]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_entries_sum_with_their_weights(dtype: torch.dtype) -> None:
    group = make_group(dtype)
    s = group.starts
    ranges: list[RowRanges] = [
        ((s[0], 1.0), (s[4], 1.0)),
        ((s[2], 0.5), (s[3], -0.75), (s[1], 2.0)),
        ((s[4], 0.0),),
        ((s[1], -1.0),),
        ((s[3], 1.0), (s[3], -1.0)),
    ]
    batch, (ys, x) = rows_of(ranges), make_xy(group, len(ranges))
    got = run(group.bind(), ys, x, stage(batch))
    assert_rounded_once(got, expected(group, ys, x, batch), ys)
    assert all(torch.equal(g[2], y[2]) and torch.equal(g[4], y[4]) for g, y in zip(got, ys, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_modules_that_an_adapter_does_not_target_keep_their_bits(dtype: torch.dtype) -> None:
    group = make_group(dtype)
    group.untarget(4, 1)
    group.untarget(3, 0)
    s = group.starts
    ranges: list[RowRanges] = [((s[4], 1.0),), ((s[3], 1.0), (s[4], 1.0)), ((s[4], 1.0),)]
    batch = LoRABatch.build([1, 1, 20], ranges, min_segment=16)
    assert batch is not None
    ys, x = make_xy(group, 22)
    ys[1][:, 0] = -0.0  # a sum with 0 would turn it into +0.0
    got = run(group.bind(), ys, x, stage(batch))
    alone = [0, *range(2, 22)]
    assert bits([got[1][alone]]) == bits([ys[1][alone]])
    assert_rounded_once(got, expected(group, ys, x, batch), ys)


MIXED: list[tuple[int, list[tuple[int, float]]]] = [
    (1, [(0, 1.0)]),
    (1, []),
    (70, [(3, 1.0)]),  # a full tile and a piece of one
    (2, [(1, 0.5)]),
    (5, []),
    (21, [(4, -1.5)]),
    (3, [(3, 1.0), (4, 0.5)]),
    (1, [(2, 1.0)]),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_and_rows_of_one_batch(dtype: torch.dtype) -> None:
    group = make_group(dtype)
    ranges = [tuple((group.starts[i], weight) for i, weight in adapters) for _, adapters in MIXED]
    batch = LoRABatch.build([count for count, _ in MIXED], ranges, min_segment=16)
    assert batch is not None
    ys, x = make_xy(group, batch.num_tokens)
    staged = stage(batch)
    assert (staged.caps.num_rows, staged.caps.num_tiles) == (1 + 2 + 3 + 1, 2 + 1)
    got = run(group.bind(), ys, x, staged)
    assert_rounded_once(got, expected(group, ys, x, batch), ys)
    is_base = torch.from_numpy(np.diff(batch.indptr) == 0).to(DEVICE)
    assert is_base.sum() == 6 and bits([y[is_base] for y in got]) == bits([y[is_base] for y in ys])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_do_not_depend_on_company_or_bucket(dtype: torch.dtype) -> None:
    group = make_group(dtype)
    bound, eight, sixteen = group.bind(), *(Buffer(LoRACaps.decode(cap, max_rank=MAX_RANK)) for cap in (8, 16))
    ranges = group.one_each([4, 3, 0, 4])
    ys, x = make_xy(group, 16)
    in_company = run(bound, [y[:8] for y in ys], x[:8], eight.load(rows_of(ranges)))
    in_sixteen = run(bound, ys, x, sixteen.load(rows_of([*ranges, *group.one_each([0, 4, 1, 2, 3, 1])])))
    assert bits([y[:4] for y in in_company]) == bits([y[:4] for y in in_sixteen])
    for t in (1, 3):
        alone = run(bound, [y[t : t + 1] for y in ys], x[t : t + 1], stage(rows_of([ranges[t]])))
        assert bits(alone) == bits([y[t : t + 1] for y in in_company])


def test_a_smaller_batch_after_a_larger_one_leaves_no_ghost() -> None:
    group = make_group(torch.float32)
    bound = group.bind()
    buffer = Buffer(LoRACaps(num_tokens=40, num_rows=20, num_entries=24, num_tiles=2, max_rank=MAX_RANK))
    s = group.starts
    full = LoRABatch.build([16, 16, 8], [((s[4], 1.0),), ((s[3], 2.0),), ((s[0], 1.0), (s[1], 1.0))], min_segment=16)
    ys, x = make_xy(group, 40)
    run(bound, ys, x, buffer.load(full))
    small = rows_of([(), ((s[2], 0.5),), ()])  # 3 of 40 tokens
    got = run(bound, ys, x, buffer.load(small))
    fresh = Buffer(buffer.caps)
    fresh.load(small)
    assert torch.equal(buffer.device, fresh.device) and not (buffer.device == 0x7FFFFFFF).any()
    untouched = [0, *range(2, 40)]
    assert bits([y[untouched] for y in got]) == bits([y[untouched] for y in ys])
    assert all((g[1] - y[1]).abs().max() > 0.1 for g, y in zip(got, ys, strict=True))
    assert bits(run(bound, ys, x, buffer.load(None))) == bits(ys)


def test_the_same_step_twice_has_the_same_bits() -> None:
    group = make_group(torch.bfloat16)
    batch = LoRABatch.build([1, 20, 1], [*group.one_each([4, 4, 2])], min_segment=16)
    assert batch is not None
    ys, x = make_xy(group, 22)
    bound, staged = group.bind(), stage(batch)
    assert bits(run(bound, ys, x, staged)) == bits(run(bound, ys, x, staged))


@pytest.mark.parametrize("layout_of_x", ["slice of a fused tensor", "transposed", "with a leading dimension"])
def test_layouts_of_x(layout_of_x: str) -> None:
    group = make_group(torch.float32)
    batch = rows_of([*group.one_each([0, 4]), ()])
    ys, x = make_xy(group, 3)
    strided = {
        "slice of a fused tensor": torch.cat([x, x + 1], dim=1)[:, :IN],
        "transposed": x.T.contiguous().T,
        "with a leading dimension": x.unsqueeze(0),
    }[layout_of_x]
    assert bits(run(group.bind(), ys, strided, stage(batch))) == bits(run(group.bind(), ys, x, stage(batch)))


def test_an_adapter_over_the_rank_of_the_workspace_is_nan_not_cut_short() -> None:
    group = make_group(torch.float32)
    batch = LoRABatch.build([1, 20, 1], [*group.one_each([4, 4, 1])], min_segment=16)
    assert batch is not None
    ys, x = make_xy(group, 22)
    got = run(group.bind(), ys, x, LoRAStaging(max_rank=32).stage(batch, DEVICE))
    assert all(y[:21].isnan().all() and not y[21].isnan().any() for y in got)


def test_what_is_refused() -> None:
    group = make_group(torch.float32)
    (ys, x), staged = make_xy(group, 2), stage(rows_of(group.one_each([0, 1])))
    with pytest.raises(RuntimeError, match="batch of 2 tokens"):
        group.bind().add(ys, x[:1], staged)
    with pytest.raises(RuntimeError, match="bfloat16"):
        group.bind().add(ys, x.bfloat16(), staged)
    with pytest.raises(RuntimeError, match="contiguous"):
        group.bind().add([y.T.contiguous().T for y in ys], x, staged)
    half = replace(group.pools, a_pool=group.pools.a_pool.half(), b_pools=tuple(b.half() for b in group.pools.b_pools))
    with pytest.raises(ValueError, match="float16"):
        gpu.bind(half)
    with pytest.raises(ValueError, match="5 modules"):
        gpu.bind(make_group(torch.float32, outs=(8,) * 5).pools)
