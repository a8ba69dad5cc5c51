"""Computes pairs of fused experts from tensors that have been read. Knows nothing of files or of the base's weights."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from adapters.adapter_extras import ExpertPair, ExpertPairs
from adapters.base_parts import ExpertsShape
from adapters.expert_layout import BLayout, Projection, fused_pair, joined
from adapters.place_experts import PlacedExperts

Ready = Callable[[Tensor, str], Tensor]
"""(tensor, name of one it was made from) → as computed with, finite; raises AdapterRefused."""


def run_experts(
    placed: Sequence[PlacedExperts],
    shapes: Mapping[str, ExpertsShape],
    read: Callable[[str], Tensor],
    ready: Ready,
    dtype: torch.dtype,
) -> dict[str, ExpertPairs]:
    """experts module → its pairs, in `dtype`. `read` gives a stored tensor in float32."""
    of_product: defaultdict[tuple[str, bool], list[PlacedExperts]] = defaultdict(list)
    for each in placed:
        of_product[each.module, each.is_down].append(each)
    pairs: dict[str, dict[bool, ExpertPair]] = {}
    for (module, is_down), some in of_product.items():
        made = _made(some, shapes[module], read, dtype, is_down=is_down)
        names = some[0].pair.inputs
        pairs.setdefault(module, {})[is_down] = ExpertPair(ready(made.a, names[0]), ready(made.b, names[1]))
    return {module: ExpertPairs(gate_up=of.get(False), down=of.get(True)) for module, of in sorted(pairs.items())}


def _made(
    some: Sequence[PlacedExperts],
    shape: ExpertsShape,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    *,
    is_down: bool,
) -> ExpertPair:
    if some[0].pair.form in ("single", "stacked"):
        parts: dict[tuple[int, Projection], tuple[Tensor, Tensor, float]] = {}
        for each in some:
            for expert, lora_a, lora_b in _each_expert(each, shape.num_experts, read):
                parts[expert, each.projection] = (lora_a, lora_b, each.pair.scale)
        return joined(parts, shape, is_down=is_down, dtype=dtype)
    (each,) = some
    lora_a, lora_b = (read(name) for name in each.pair.inputs)
    layout: BLayout = "rank_major" if each.pair.form == "rank_major" else "grouped_by_expert"
    return fused_pair(
        lora_a, lora_b, num_experts=shape.num_experts, side=each.side, layout=layout, scale=each.pair.scale
    )


def _each_expert(
    placed: PlacedExperts, num_experts: int, read: Callable[[str], Tensor]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, A [r, in] and B [out, r] of the experts that it is for."""
    lora_a, lora_b = (read(name) for name in placed.pair.inputs)
    if placed.pair.expert is not None:
        yield placed.pair.expert, lora_a, lora_b
        return
    if lora_a.ndim == 2:
        lora_a = lora_a.view(num_experts, -1, lora_a.shape[1])  # [E, r, in]
    for expert in range(num_experts):
        yield expert, lora_a[expert % len(lora_a)], lora_b[expert % len(lora_b)]  # one stands for all
