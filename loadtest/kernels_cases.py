"""The CPU operations of a decode step and of a prompt, at the shapes of the default model, as cases to time.

Bytes are those that must come from memory in a step: adapters, weights, K and V. What one operation leaves for the next
(x and y) lies in the cache by then and is not counted, which makes a floor lower and the ratio to it stricter; only
RMSNorm and rotary move nothing else, and theirs are counted. Knows nothing of clocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from adapters.lora_batch import LoRABatch
from adapters.ops import cpu
from adapters.ops.interface import LoRAPools
from adapters.ops.thread_team import ThreadTeam
from loadtest.kernels_timing import Case
from server.engine.attention.cpu import CPUAttention
from server.engine.attention.interface import AttentionMetadata, KVLayer
from server.engine.fused_norm import fuse_norms
from server.engine.fused_rotary import fuse_rotary
from server.engine.packed_linear import pack_linears

LORA, PRODUCT = "LoRA", "product"
RANK = 16
NUM_LAYERS, HIDDEN = 30, 576
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
DECODE_ROWS = (1, 8, 32)
PROMPT, PROMPT_ADAPTERS = 512, (1, 8)
CONTEXTS = (128, 1024)
_ATTENTION_ROWS = (8, 32)
_BLOCK_SIZE = 16
_ELEMENT = 2  # bytes of a bfloat16


class Group(NamedTuple):
    """Linears that read one input."""

    name: str
    in_features: int
    out_features: tuple[int, ...]

    @property
    def shape(self) -> str:
        return f"{self.name} {self.in_features} → {' + '.join(map(str, self.out_features))}"

    @property
    def weights_per_rank(self) -> int:
        """Elements of A and B for each rank of an adapter."""
        return self.in_features * len(self.out_features) + sum(self.out_features)

    @property
    def base_weights(self) -> int:
        return self.in_features * sum(self.out_features)


GROUPS = (
    Group("qkv", HIDDEN, (576, 192, 192)),
    Group("o", 576, (HIDDEN,)),
    Group("gate_up", HIDDEN, (1536, 1536)),
    Group("down", 1536, (HIDDEN,)),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much data the calls of a case walk over, at least, before they come back to the same."""

    working_set: int  # bytes
    num_layers: int = NUM_LAYERS  # that one step's adapters pass through

    def copies(self, num_bytes: float) -> int:
        """Sets of `num_bytes` that make up the working set."""
        return max(1, -(-self.working_set // int(num_bytes)))


def families(sizes: Sizes, team: ThreadTeam) -> Iterator[tuple[str, list[Case]]]:
    """(name, cases), one family after the other, so that the data of one are gone before the next are made."""
    yield LORA, [case for group in GROUPS for case in lora_cases(group, sizes)]
    yield PRODUCT, [case for group in GROUPS for case in _product_cases(group, sizes, team)]
    yield "attention", [case for context in CONTEXTS for case in _attention_cases(context, sizes)]
    yield "norm and rotary", [case for rows in (*DECODE_ROWS, PROMPT) for case in _small_cases(rows)]


def draw(*shape: int) -> Tensor:
    """Small random bfloat16 numbers, a few drawn and then repeated: not what they are matters but where they lie."""
    count = int(np.prod(shape))
    few = (torch.randn(min(count, 1 << 16)) * 0.05).bfloat16()
    return few.repeat(-(-count // len(few)))[:count].view(shape)


def lora_cases(group: Group, sizes: Sizes) -> list[Case]:
    """y_m += x · A_mᵀ · B_m with an adapter of its own for each decode row, and 1 or 8 adapters for a prompt.

    The pools are those of all layers. A pass takes one set of adapters through all layers, then the next set.
    """
    most = max(*DECODE_ROWS, *PROMPT_ADAPTERS)
    adapter_bytes = _ELEMENT * RANK * group.weights_per_rank
    num_adapters = most * -(-sizes.copies(sizes.num_layers * adapter_bytes) // most)
    layers = [cpu.bind(lora_pools(group, num_adapters)) for _ in range(sizes.num_layers)]
    decode = [(rows, rows, f"{rows} rows, {rows} adapters") for rows in DECODE_ROWS]
    prompt = [(PROMPT, adapters, f"{PROMPT} tokens, {adapters} adapters") for adapters in PROMPT_ADAPTERS]
    cases = []
    for tokens, adapters, size in (*decode, *prompt):
        x = draw(tokens, group.in_features)
        ys = [draw(tokens, out) for out in group.out_features]
        batches = [lora_batch(tokens, adapters, first) for first in range(0, num_adapters, adapters)]
        cases.append(
            Case(
                op=LORA,
                shape=group.shape,
                size=size,
                calls=[partial(layer.add, ys, x, cpu.stage(batch)) for batch in batches for layer in layers],
                num_bytes=adapters * adapter_bytes,
                flops=2 * tokens * RANK * group.weights_per_rank,
                rows=tokens,
                is_decode=tokens in DECODE_ROWS,
            )
        )
    return cases


def lora_pools(group: Group, num_adapters: int) -> LoRAPools:
    """One layer's pools, with an adapter at every RANK rows."""
    num_rows, modules = num_adapters * RANK, len(group.out_features)
    ranks = torch.zeros(modules, num_rows, dtype=torch.int32)
    ranks[:, ::RANK] = RANK
    b_pools = tuple(draw(num_rows, out) for out in group.out_features)
    return LoRAPools(a_pool=draw(modules, num_rows, group.in_features), b_pools=b_pools, ranks=ranks)


def lora_batch(tokens: int, adapters: int, first: int) -> LoRABatch:
    """A request for each adapter from `first` on, of equally many tokens, built as the engine builds it."""
    ranges = [(((first + number) * RANK, 1.0),) for number in range(adapters)]
    batch = LoRABatch.build([tokens // adapters] * adapters, ranges, is_prompt=[tokens > adapters] * adapters)
    assert batch is not None
    return batch


def _product_cases(group: Group, sizes: Sizes, team: ThreadTeam) -> list[Case]:
    """y_m = x · W_mᵀ by the linears as the engine packs them."""
    num_bytes = _ELEMENT * group.base_weights
    layers = [_linears(group) for _ in range(sizes.copies(num_bytes))]
    names = [[f"{i}.{m}" for m in range(len(group.out_features))] for i in range(len(layers))]
    counted = pack_linears(nn.ModuleList(map(nn.ModuleList, layers)), names, team)
    kind = "panels" if counted.panels else "oneDNN" if counted.onednn else "torch"
    return [
        Case(
            op=PRODUCT,
            shape=group.shape,
            size=f"{rows} rows, {kind}",
            calls=[partial(_multiply, linears, draw(rows, group.in_features)) for linears in layers],
            num_bytes=num_bytes,
            flops=2 * rows * group.base_weights,
            rows=rows,
            is_decode=rows in DECODE_ROWS,
        )
        for rows in (*DECODE_ROWS, PROMPT)
    ]


def _linears(group: Group) -> list[nn.Linear]:
    found = []
    for out in group.out_features:
        linear = nn.Linear(group.in_features, out, bias=False, device="meta", dtype=torch.bfloat16)
        linear.weight = nn.Parameter(draw(out, group.in_features), requires_grad=False)
        found.append(linear)
    return found


def _multiply(linears: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
    return [linear(x) for linear in linears]


def _attention_cases(context: int, sizes: Sizes) -> list[Case]:
    """One new token a row over `context` tokens in the cache, whose blocks lie in no order."""
    cases = []
    for rows in _ATTENTION_ROWS:
        kv_bytes = 2 * _ELEMENT * rows * context * NUM_KV_HEADS * HEAD_DIM
        num_blocks = rows * -(-context // _BLOCK_SIZE)
        layers = [_kv_layer(num_blocks) for _ in range(sizes.copies(kv_bytes))]
        cases.append(
            Case(
                op="attention",
                shape=f"{NUM_HEADS} heads, {NUM_KV_HEADS} of K and V, {HEAD_DIM} wide",
                size=f"{rows} rows, context {context}",
                calls=_attention_calls(layers, _metadata(rows, context)),
                num_bytes=kv_bytes,
                flops=4 * rows * context * NUM_HEADS * HEAD_DIM,
                rows=rows,
            )
        )
    return cases


def _attention_calls(layers: Sequence[KVLayer], metadata: AttentionMetadata) -> list[Callable[[], object]]:
    rows, attend = len(metadata.context_lens), CPUAttention()
    q = draw(rows, NUM_HEADS, HEAD_DIM)
    k, v = (draw(rows, NUM_KV_HEADS, HEAD_DIM) for _ in range(2))
    options: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "sliding_window": None, "softcap": None}
    return [partial(attend, q, k, v, layer, metadata, **options) for layer in layers]


def _kv_layer(num_blocks: int) -> KVLayer:
    shape = num_blocks, _BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM
    return KVLayer(draw(*shape), draw(*shape))


def _metadata(rows: int, context: int) -> AttentionMetadata:
    per_row = -(-context // _BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(rows * per_row).astype(np.int32).reshape(rows, per_row)
    last = context - 1
    return AttentionMetadata(
        query_starts=np.arange(rows + 1, dtype=np.int32),
        context_lens=np.full(rows, context, np.int32),
        block_tables=tables,
        slot_mapping=(tables[:, last // _BLOCK_SIZE].astype(np.int64) * _BLOCK_SIZE + last % _BLOCK_SIZE),
        num_decode_rows=rows,
    )


class _Rotary(nn.Module):
    """An attention module reduced to the one call that the engine replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, cos, sin)
        return turned


def _small_cases(rows: int) -> list[Case]:
    """RMSNorm and rotary over rows that are in the cache already: the ratio shows what the call costs, not memory."""
    norm, rotary = LlamaRMSNorm(HIDDEN).bfloat16().requires_grad_(False), _Rotary()
    fused = fuse_norms(norm) == 1, fuse_rotary(rotary) == 1
    q, k = (draw(1, rows, heads, HEAD_DIM).transpose(1, 2) for heads in (NUM_HEADS, NUM_KV_HEADS))
    cos, sin = (draw(1, rows, HEAD_DIM) for _ in range(2))
    x = draw(rows, HIDDEN)
    kinds = ["fused" if each else "stock" for each in fused]
    heads = NUM_HEADS + NUM_KV_HEADS
    return [
        Case(
            op="RMSNorm", shape=f"{HIDDEN}", size=f"{rows} rows, {kinds[0]}", calls=[partial(norm, x)],
            num_bytes=2 * _ELEMENT * x.numel(), flops=4 * x.numel(), rows=rows, per_layer=2,
            is_decode=rows in DECODE_ROWS,
        ),
        Case(
            op="rotary", shape=f"{heads} heads of {HEAD_DIM}", size=f"{rows} rows, {kinds[1]}",
            calls=[partial(rotary, q, k, cos, sin)], num_bytes=2 * _ELEMENT * rows * HEAD_DIM * (heads + 1),
            flops=3 * rows * heads * HEAD_DIM, rows=rows, is_decode=rows in DECODE_ROWS,
        ),
    ]  # fmt: skip
