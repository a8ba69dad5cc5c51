"""Each operation by itself, on the shapes of a model: against the reference for right, against its floor for fast."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.lora_batch import LoRABatch
from adapters.ops import AffineTable, gpu, gpu_affine, reference, reference_affine
from adapters.ops.gpu_affine_batch import AffineStaging, AffineStep
from adapters.ops.gpu_batch import LoRAStaging
from adapters.ops.interface import LoRAPools
from loadtest.gpu.timing import Ceilings, Device
from server.engine.attention import gpu_batch
from server.engine.attention import reference as attention_reference
from server.engine.attention.gpu import GPUAttention
from server.engine.attention.interface import AttentionMetadata, KVLayer

Row = dict[str, Any]
_SETS = 4
"""Disjoint sets of data that timed calls rotate through, so that the cache does not answer for the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    name: str
    in_features: int
    out_features: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSettings:
    groups: tuple[Group, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lora_rank: int = 16
    decode: tuple[tuple[int, int], ...] = ((8, 8), (32, 1), (32, 8), (32, 32))  # rows, adapters
    affine_decode: tuple[tuple[int, int], ...] = ((32, 0), (32, 1), (32, 32))  # the same; 0 = nobody has vectors
    prefill: tuple[tuple[int, int], ...] = ((2048, 1), (2048, 4))  # tokens, adapters
    context: int = 1024


LLAMA_8B = KernelSettings(
    groups=(
        Group(name="qkv", in_features=4096, out_features=(4096, 1024, 1024)),
        Group(name="o", in_features=4096, out_features=(4096,)),
        Group(name="gate_up", in_features=4096, out_features=(14336, 14336)),
        Group(name="down", in_features=14336, out_features=(4096,)),
    ),
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
)
TINY = KernelSettings(
    groups=(Group(name="qkv", in_features=48, out_features=(48, 16)),),
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    lora_rank=4,
    decode=((2, 2),),
    affine_decode=((2, 0), (2, 1)),
    prefill=((64, 1),),
    context=20,
)


def measure_kernels(device: Device, ceilings: Ceilings, settings: KernelSettings) -> list[Row]:
    rows = [
        _lora(device, ceilings, settings, group, *case, is_decode=is_decode)
        for group in settings.groups
        for is_decode, cases in ((True, settings.decode), (False, settings.prefill))
        for case in cases
    ]
    shapes = [*((n, 1, settings.context) for n in sorted({n for n, _ in settings.decode}))]
    shapes += [(1, settings.prefill[0][0], 0)]
    rows += [
        _affine(device, ceilings, group, *case, is_decode=is_decode)
        for group in settings.groups
        for is_decode, cases in ((True, settings.affine_decode), (False, settings.prefill))
        for case in cases
    ]
    return rows + [_attention(device, ceilings, settings, *shape) for shape in shapes]


def _line(name: str, case: str, seconds: float, floor: float, error: float) -> Row:
    micro = 1e6
    return {
        "op": name, "case": case, "us": micro * seconds, "floor_us": micro * floor,
        "over_floor": seconds / floor, "error": error,
    }  # fmt: skip


def _lora(
    device: Device, ceilings: Ceilings, settings: KernelSettings, group: Group, tokens: int, adapters: int, *,
    is_decode: bool,
) -> Row:  # fmt: skip
    """y += x · A · B. Floor: the adapters in use read once; x read, y read and written where tokens are many."""
    rank, where = settings.lora_rank, device.device
    pools = _pools(group, _SETS * adapters * rank, rank, where)
    bound, staging = gpu.bind(pools), LoRAStaging(max_rank=rank)
    x = torch.randn(tokens, group.in_features, device=where).to(torch.bfloat16)
    ys = [torch.randn(tokens, out, device=where).to(torch.bfloat16) for out in group.out_features]
    batches = [_batch(tokens, adapters, i * adapters, rank, is_decode=is_decode) for i in range(_SETS)]
    staged = [staging.stage(batch, where) for batch in batches]
    error = _lora_error(bound.add, pools, ys, x, batches[0], staged[0])
    seconds = device.graphed([lambda s=s: bound.add(ys, x, s) for s in staged])  # type: ignore[misc]
    outs, modules = sum(group.out_features), len(group.out_features)
    per_rank = group.in_features * modules + outs
    touched = tokens * (group.in_features + 2 * outs)
    floor = ceilings.floor(2 * (adapters * rank * per_rank + touched), 2 * tokens * rank * per_rank)
    return _line(f"lora {group.name}", f"{tokens} tokens, {adapters} adapters", seconds, floor, error)


def _pools(group: Group, num_rows: int, rank: int, device: torch.device) -> LoRAPools:
    modules = len(group.out_features)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) * 0.05).to(torch.bfloat16)

    ranks = torch.zeros(modules, num_rows, dtype=torch.int32, device=device)
    ranks[:, ::rank] = rank
    return LoRAPools(
        a_pool=draw(modules, num_rows, group.in_features),
        b_pools=tuple(draw(num_rows, out) for out in group.out_features),
        ranks=ranks,
    )


def _batch(tokens: int, adapters: int, first: int, rank: int, *, is_decode: bool) -> LoRABatch:
    num_requests = tokens if is_decode else adapters
    counts = [tokens // num_requests] * num_requests
    ranges = [(((first + i * adapters // num_requests) * rank, 1.0),) for i in range(num_requests)]
    batch = LoRABatch.build(counts, ranges, min_segment=tokens + 1 if is_decode else 16)
    assert batch is not None
    return batch


def _lora_error(
    add: Callable[..., None], pools: LoRAPools, ys: list[Tensor], x: Tensor, batch: LoRABatch, staged: object
) -> float:
    """Of the delta, over a few tokens' worth of the reference, relative in the norm."""
    ours, expected = [y.clone() for y in ys], [y.clone() for y in ys]
    add(ours, x, staged)
    reference.bind(pools).add(expected, x, batch)
    return _relative(torch.cat(ours, 1), torch.cat(expected, 1))


def _affine(device: Device, ceilings: Ceilings, group: Group, tokens: int, adapters: int, *, is_decode: bool) -> Row:
    """y ⊙ (1 + d) + c. Decode: as many rows as adapters have vectors, of a bucket of all; prefill: every token. Floor:
    vectors in use read once, y of those tokens read and written, and whom each row uses."""
    where, outs = device.device, group.out_features
    table = AffineTable(len(outs), _SETS * max(1, adapters), where)
    for start in range(_SETS * adapters):
        table.write(start, {site: torch.randn(2, out, device=where) * 0.05 for site, out in enumerate(outs)})
    bound, part = gpu_affine.bind_affine(table, range(len(outs)), outs), AffineStaging()
    steps = [_affine_step(tokens, adapters, i * adapters, is_decode=is_decode) for i in range(_SETS)]
    staged = [part.stage(step, where, part.bucket(tokens) if is_decode else None) for step in steps]
    ys = [torch.randn(tokens, out, device=where).to(torch.bfloat16) for out in outs]
    ours, expected = [y.clone() for y in ys], [y.clone() for y in ys]
    bound.apply(ours, staged[0])
    reference_affine.bind_affine(table, range(len(outs)), outs).apply(
        expected, reference_affine.stage_affine(steps[0].lora, steps[0].tokens)
    )
    seconds = device.graphed([lambda s=s: bound.apply(ys, s) for s in staged])  # type: ignore[misc]
    num_affine = len(steps[0].tokens)
    touched = (8 * adapters + 4 * num_affine) * sum(outs) + 4 * tokens
    floor = ceilings.floor(touched, 2 * num_affine * sum(outs))
    error = _relative(torch.cat(ours, 1), torch.cat(expected, 1))
    return _line(f"affine {group.name}", f"{tokens} tokens, {adapters} adapters", seconds, floor, error)


def _affine_step(tokens: int, adapters: int, first: int, *, is_decode: bool) -> AffineStep:
    if is_decode:  # one row an adapter, the others have pairs alone
        counts, ranges = [1] * tokens, [((first + i, 1.0),) if i < adapters else () for i in range(tokens)]
    else:
        counts, ranges = [tokens // adapters] * adapters, [((first + i, 1.0),) for i in range(adapters)]
    lora = LoRABatch.build(counts, ranges, min_segment=tokens + 1 if is_decode else 16)
    if lora is None:
        nothing = np.zeros(0, np.int32)
        lora = LoRABatch(np.zeros(tokens + 1, np.int32), nothing, np.zeros(0, np.float32), nothing, ())
    return AffineStep(lora, np.arange(adapters if is_decode else tokens, dtype=np.int32))


def _relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def _attention(
    device: Device, ceilings: Ceilings, settings: KernelSettings, num_rows: int, num_new: int, context: int
) -> Row:
    """Floor: K and V of every context read once, or two products over half the square for a prompt."""
    length, where, block_size = context + num_new, device.device, 16
    heads, kv_heads, dim = settings.num_heads, settings.num_kv_heads, settings.head_dim
    blocks = -(-length // block_size)
    layers = [_kv_layer(num_rows * blocks, block_size, kv_heads, dim, where) for _ in range(_SETS)]
    metadata = _metadata(num_rows, num_new, length, blocks, block_size)
    staged, attend = gpu_batch.stage(metadata, where), GPUAttention()
    q = torch.randn(num_rows * num_new, heads, dim, device=where).to(torch.bfloat16)
    k, v = (torch.randn(num_rows * num_new, kv_heads, dim, device=where).to(torch.bfloat16) for _ in range(2))
    options: dict[str, Any] = {"scale": dim**-0.5, "sliding_window": None, "softcap": None}
    ours = attend(q, k, v, layers[0], staged, **options)
    error = _relative(ours, attention_reference.attend(q, k, v, layers[0], metadata, **options))
    seconds = device.graphed([lambda one=one: attend(q, k, v, one, staged, **options) for one in layers])  # type: ignore[misc]
    kv_bytes = 2 * 2 * num_rows * length * kv_heads * dim
    flops = 4 * num_rows * num_new * (context + num_new / 2) * heads * dim
    floor = ceilings.floor(kv_bytes + 4 * q.numel(), flops)
    return _line("attention", f"{num_rows} rows, {num_new} new, context {length}", seconds, floor, error)


def _kv_layer(num_blocks: int, block_size: int, kv_heads: int, dim: int, device: torch.device) -> KVLayer:
    shape = num_blocks, block_size, kv_heads, dim
    return KVLayer(*(torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(2)))


def _metadata(num_rows: int, num_new: int, length: int, blocks: int, block_size: int) -> AttentionMetadata:
    tables = np.arange(num_rows * blocks, dtype=np.int32).reshape(num_rows, blocks)
    positions = np.arange(length - num_new, length)
    slots = tables[:, positions // block_size] * block_size + positions % block_size
    return AttentionMetadata(
        query_starts=np.arange(0, num_rows * num_new + 1, num_new, dtype=np.int32),
        context_lens=np.full(num_rows, length, np.int32),
        block_tables=tables,
        slot_mapping=slots.reshape(-1).astype(np.int64),
        num_decode_rows=num_rows if num_new == 1 else 0,
    )
