"""How the files of an adapter hold pairs for fused experts, and what they are to an expert's own product.

The formats differ in three ways that no shape tells apart: which side of the parameter A stands on, whether an expert's
ranks lie together in B, and in which order gate and up stand. Facts: PEFT 0.21 tuners/lora/layer.py ParamWrapper (A has
the expert slowest, B the expert fastest; before 0.19 A stood on the parameter's second dimension, whatever that was);
Unsloth wrote B grouped by expert until September 2026. Pure functions of tensors; knows nothing of names or files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapters.adapter_extras import ExpertPair
from adapters.base_parts import ExpertsShape

ASide = Literal["input", "output"]
BLayout = Literal["rank_major", "grouped_by_expert"]
Projection = Literal["gate", "up", "down"]

_SWAPS_SINCE = (0, 19)


@dataclass(frozen=True, slots=True)
class ProductShape:
    """x [in_features] → y [out_features] of one expert, whichever way round the parameter is stored."""

    in_features: int
    out_features: int


def product_of(experts: ExpertsShape, *, is_down: bool) -> ProductShape:
    """down_proj, or gate_up_proj with both halves."""
    if is_down:
        return ProductShape(experts.intermediate_size, experts.hidden_size)
    return ProductShape(experts.hidden_size, 2 * experts.intermediate_size)


def side_of_a(
    width: int, product: ProductShape, *, is_transposed: bool, peft_version: tuple[int, int] | None
) -> ASide | None:
    """Which side of the product A [E·r, width] reads; None where nothing tells. ValueError when `width` is neither.

    `is_transposed`: the parameter is stored [E, in, out].
    """
    if width not in (product.in_features, product.out_features):
        raise ValueError(f"A reads {width} features, the product has {product.in_features} and {product.out_features}")
    if product.in_features != product.out_features:
        return "input" if width == product.in_features else "output"
    if is_transposed:  # the parameter's second dimension is the input, as it always was
        return "input"
    if peft_version is None:
        return None
    return "input" if peft_version >= _SWAPS_SINCE else "output"


def fused_pair(
    lora_a: Tensor, lora_b: Tensor, *, num_experts: int, side: ASide, layout: BLayout, scale: float
) -> ExpertPair:
    """PEFT's A [E·r, d] and B [d', r·E] as pairs of each expert's product, in float32, the scale in b."""
    a = lora_a.float().view(num_experts, -1, lora_a.shape[1])  # [E, r, d]
    b = _by_expert(lora_b.float(), num_experts, layout)  # [E, r, d']
    return ExpertPair(a, b * scale) if side == "input" else ExpertPair(b, a * scale)


def _by_expert(lora_b: Tensor, num_experts: int, layout: BLayout) -> Tensor:
    if layout == "rank_major":
        return lora_b.view(lora_b.shape[0], -1, num_experts).permute(2, 1, 0).contiguous()
    return lora_b.view(lora_b.shape[0], num_experts, -1).permute(1, 2, 0).contiguous()


def joined(
    parts: Mapping[tuple[int, Projection], tuple[Tensor, Tensor, float]],
    experts: ExpertsShape,
    *,
    is_down: bool,
    dtype: torch.dtype = torch.float32,
) -> ExpertPair:
    """Pairs of single experts' projections as one pair of the fused product, scaled in float32, kept in `dtype`.

    (expert, projection) → A [r, in], B [out, r], scale: what is not there is zero, ranks are filled up to the widest.
    gate and up keep ranks of their own, since each has its own A.
    """
    product = product_of(experts, is_down=is_down)
    kinds: Sequence[Projection] = ("down",) if is_down else ("gate", "up")
    widths = [max((a.shape[0] for (_, of), (a, _, _) in parts.items() if of == kind), default=0) for kind in kinds]
    joint_a = torch.zeros(experts.num_experts, sum(widths), product.in_features, dtype=dtype)
    joint_b = torch.zeros(experts.num_experts, sum(widths), product.out_features, dtype=dtype)
    for (expert, kind), (a, b, scale) in parts.items():
        first = sum(widths[: kinds.index(kind)])
        ranks = slice(first, first + a.shape[0])
        joint_a[expert, ranks] = a.float()
        joint_b[expert, ranks, _columns(kind, experts)] = (b.float() * scale).T
    return ExpertPair(joint_a, joint_b)


def _columns(kind: Projection, experts: ExpertsShape) -> slice:
    """Where the outputs of a projection stand among those of its fused product."""
    if kind == "down":
        return slice(None)
    if experts.is_interleaved:
        return slice(int(kind == "up"), None, 2)
    middle = experts.intermediate_size
    return slice(0, middle) if kind == "gate" else slice(middle, None)
