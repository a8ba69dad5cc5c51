"""An input embedding that looks up other rows, or adds low-rank ones, for the tokens of some adapters.

Whatever the model multiplies its embeddings by multiplies all of them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.applied_extras import AppliedEmbedding
from adapters.base_parts import EmbeddingShape
from adapters.class_swap import STATE
from adapters.extras_batch import ExtrasBatch
from adapters.host_call import host_call
from adapters.hosted_rows import blend
from adapters.lora_step import Step
from adapters.ops import product
from adapters.staged_extras import StagedExtras
from adapters.step_features import StepFeature


class EmbeddingSite:
    def __init__(self, step: Step, forward: Callable[[Tensor], Tensor], shape: EmbeddingShape) -> None:
        self.step = step
        self.forward = forward  # without adapters
        self.table: dict[int, AppliedEmbedding] = {}  # by first pool row
        self._shape = shape

    def apply(self, extras: StagedExtras, y: Tensor, ids: Tensor) -> None:
        """y [.., hidden] is the base's lookup of ids [..], which holds 0 for ids beyond it."""
        batch = extras.batch
        y_rows, ids = y.view(-1, self._shape.width), _own_ids(ids.reshape(-1), batch)
        if len(ids) != extras.num_tokens:
            raise RuntimeError(f"{len(ids)} ids were looked up in a step of {extras.num_tokens} tokens")
        if batch.foreign_ids:  # the base has no such rows: what it looked up instead is not its own
            y_rows[[token for token, _ in batch.foreign_ids]] = 0
        scale = torch.tensor(self._shape.scale, dtype=y.dtype, device=y.device)

        def own(start: int, rows: Tensor) -> Tensor | None:
            held = self.table.get(start)
            return None if held is None else _lookup(held, ids[rows], y_rows[rows], scale)

        blend(y_rows, batch.tokens, own)


class LoRAEmbedding(nn.Module):
    """Mixed in before an embedding's own class."""

    def forward(self, ids: Tensor) -> Tensor:
        site: EmbeddingSite = self.__dict__[STATE]
        y = site.forward(ids)
        extras = site.step.extras
        if extras is None or not extras.features & StepFeature.EMBEDDING:
            return y
        y = y.contiguous()
        host_call(partial(site.apply, extras), y, ids)
        return y


def _own_ids(ids: Tensor, batch: ExtrasBatch) -> Tensor:
    """ids [num_tokens] with those that the base does not have put back."""
    if batch.foreign_ids:
        ids = ids.clone()
        for token, token_id in batch.foreign_ids:
            ids[token] = token_id
    return ids


def _lookup(held: AppliedEmbedding, ids: Tensor, base: Tensor, scale: Tensor) -> Tensor:
    """What an adapter alone looks up for ids [n], float32 [n, hidden]; `base` [n, hidden] is what the base does. An id
    that the adapter does not have is the base's."""
    part, y = held.part, base
    if part.weight is not None:
        y = _put(y, ids < len(part.weight), part.weight[ids.clamp(max=len(part.weight) - 1)] * scale)
    if part.rows is not None and len(part.rows.ids):
        at = torch.searchsorted(part.rows.ids, ids).clamp(max=len(part.rows.ids) - 1)  # [n]
        y = _put(y, part.rows.ids[at] == ids, part.rows.values[at] * scale)
    y = y.float()
    if held.affine is not None:
        y = y * (1 + held.affine[0]) + held.affine[1]
    if part.lora_a is not None and part.lora_b is not None:
        # To the base's rows alone: a row in float32 has no other to be rounded with.
        shrunk = functional.embedding(ids.clamp(max=len(part.lora_a) - 1), part.lora_a)  # [n, r]
        delta = product(shrunk, part.lora_b.T) * scale.float()
        y = y + torch.where((ids < len(part.lora_a))[:, None], delta, 0)
    return y


def _put(y: Tensor, is_there: Tensor, values: Tensor) -> Tensor:
    """values [n, hidden] where is_there [n], else y."""
    return torch.where(is_there[:, None], values.to(y.dtype), y)
