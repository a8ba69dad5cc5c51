"""How stored tensors become a plain pair: A [r, in] and PEFT's B [out, r], before the scale, so that ΔW = s · B · A.

Every function is exact algebra in float32 on tensors as stored, whose shapes have been checked against `in_features`
and `out_features`; a Fold of proposal.py is one of them, or a partial of one. Knows nothing of files or configs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def _floats(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensor.float() for tensor in tensors]


def blocks_of_a(tensors: Sequence[Tensor], in_features: int, out_features: int, *, num_blocks: int) -> Pair:
    """BD-LoRA's A [r, in/n]: block i reads the i-th part of the input."""
    lora_a, lora_b = _floats(tensors)
    return torch.block_diag(*lora_a.chunk(num_blocks, 0)), lora_b


def blocks_of_b(tensors: Sequence[Tensor], in_features: int, out_features: int, *, num_blocks: int) -> Pair:
    """BD-LoRA's B [out, r/n]: block i writes the i-th part of the output."""
    lora_a, lora_b = _floats(tensors)
    return lora_a, torch.block_diag(*lora_b.chunk(num_blocks, 0))


def pooled(tensors: Sequence[Tensor], in_features: int, out_features: int, *, group: int) -> Pair:
    """QALoRA's A [r, in/g] reads means of g inputs, times in/g. A [r, in] is what PEFT stores where the base was not
    quantised: it is then not pooled."""
    lora_a, lora_b = _floats(tensors)
    if lora_a.shape[1] == in_features:
        return lora_a, lora_b
    return lora_a.repeat_interleave(group, 1) * (lora_a.shape[1] / group), lora_b


def pooled_fits(in_features: int, out_features: int, *, width: int, group: int) -> bool:
    return in_features in (width, width * group)


def transposed(tensors: Sequence[Tensor], in_features: int, out_features: int) -> Pair:
    """MLX-LM's lora_a [in, r] and lora_b [r, out]."""
    lora_a, lora_b = _floats(tensors)
    return lora_a.T, lora_b.T


def scaled_ranks(tensors: Sequence[Tensor], in_features: int, out_features: int) -> Pair:
    """AdaLoRA: B · diag(E) · A with E [r, 1]."""
    lora_a, lora_b, lora_e = _floats(tensors)
    return lora_a * lora_e, lora_b


def shared_projections(tensors: Sequence[Tensor], in_features: int, out_features: int) -> Pair:
    """VeRA: diag(λ_b) · B · diag(λ_d) · A, where A [r, ≥in] and B [≥out, r] are shared: each module takes a corner,
    and only that becomes float32, or a large shared one would be converted whole once for every module."""
    lambda_d, lambda_b, vera_a, vera_b = tensors
    corners = (lambda_d, lambda_b, vera_a[:, :in_features], vera_b[:out_features])
    lambda_d, lambda_b, vera_a, vera_b = _floats(corners)
    return lambda_d[:, None] * vera_a, lambda_b[:, None] * vera_b


def corner_fits(in_features: int, out_features: int, *, width: int) -> bool:
    return in_features <= width


def product_of_pairs(tensors: Sequence[Tensor], in_features: int, out_features: int) -> Pair:
    """LoHa: (w1a · w1b) ⊙ (w2a · w2b) has rank r²: row (i, j) of A is w1b[i] ⊙ w2b[j], column (i, j) of B w1a[:, i] ⊙
    w2a[:, j]."""
    w1_a, w1_b, w2_a, w2_b = _floats(tensors)  # [out, r], [r, in], [out, r], [r, in]
    lora_a = (w1_b[:, None] * w2_b[None]).reshape(-1, in_features)
    return lora_a, (w1_a[:, :, None] * w2_a[:, None]).reshape(out_features, -1)


def normalised_ranks(tensors: Sequence[Tensor], in_features: int, out_features: int) -> Pair:
    """DeLoRA: every rank is divided by ‖A_i‖ ‖B_i‖ and by r, times λ; A's columns are scaled by the norms of W's."""
    delora_a, delora_b, delora_lambda, w_norm = _floats(tensors)  # [r, in], [out, r], [1], [in]
    norms = delora_a.norm(dim=1).clamp(min=_LEAST_NORM) * delora_b.norm(dim=0).clamp(min=_LEAST_NORM)  # [r]
    return delora_a * w_norm, delora_b * (delora_lambda / delora_a.shape[0] / norms)


def shared_inputs(tensors: Sequence[Tensor], in_features: int, out_features: int) -> Pair:
    """MiSS: rank j reads the sum of the inputs i with i mod r = j. The block is [r, out], or, mini, [r, out/n] and is
    repeated n times."""
    (block,) = _floats(tensors)
    lora_rank = block.shape[0]
    reads = torch.arange(in_features) % lora_rank == torch.arange(lora_rank)[:, None]  # [r, in]
    return reads.to(block.dtype), block.repeat(1, out_features // block.shape[1]).T


def repeats_fit(in_features: int, out_features: int, *, lora_rank: int, width: int) -> bool:
    return lora_rank <= in_features and out_features % width == 0


_LEAST_NORM = 1e-4
"""PEFT's: below it a norm is not divided by."""
