"""Runs one step on the device: arrays in, logits out. Knows nothing of queues, blocks' owners or sampling."""

import torch
from torch import Tensor

from adapters.lora_layers import LoRALayers
from adapters.staged_extras import StagedExtras
from server.engine.base_model import BaseModel
from server.engine.forward_batch import ForwardBatch


class ModelRunner:
    """Hands the arrays straight over: for the CPU, and for devices whose operations read metadata on the host."""

    def __init__(self, base: BaseModel, lora: LoRALayers) -> None:
        self.base = base
        self.lora = lora

    @torch.inference_mode()
    def execute(self, batch: ForwardBatch, last_ids: Tensor | None = None) -> Tensor:
        """Logits [num_logits, vocab] at `batch.logits_indices`; writes the new tokens' K and V into the cache.

        `last_ids` [at least the rows of the step before] on the device: what `batch.carried` points into.
        """
        device = self.base.device
        input_ids = torch.from_numpy(batch.input_ids).to(device)
        positions = torch.from_numpy(batch.positions).to(device)
        indices = torch.from_numpy(batch.logits_indices).to(device)
        if batch.carried is not None:
            assert last_ids is not None
            input_ids = carry(input_ids, torch.from_numpy(batch.carried).to(device), last_ids)
        lora = None if batch.lora is None else self.lora.ops.stage(batch.lora)
        with (
            self.base.step_context(),
            self.base.context.running(batch.attention),
            self.lora.applying(lora, extras=staged_extras(batch, self.lora)),
        ):
            return self.base.forward(input_ids, positions, indices)


def staged_extras(batch: ForwardBatch, lora: LoRALayers) -> StagedExtras | None:
    """The batch's extras as the layers read them."""
    if batch.extras is None:
        return None
    assert batch.lora is not None
    return lora.extras.stage(batch.extras, batch.lora)


def carry(input_ids: Tensor, carried: Tensor, last_ids: Tensor) -> Tensor:
    """last_ids[carried[t]] where carried[t] is not -1, else input_ids[t]; all int64, the first two [num_tokens].

    A row without a token (-1) runs on with id 0: its request ends before anything it computes is used.
    """
    return torch.where(carried < 0, input_ids, last_ids[carried.clamp(min=0)].clamp(min=0))
