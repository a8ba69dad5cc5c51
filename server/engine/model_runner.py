"""Runs one step on the device: arrays in, logits out. Knows nothing of queues, blocks' owners or sampling."""

import torch
from torch import Tensor

from adapters.lora_layers import LoRALayers
from server.engine.base_model import BaseModel
from server.engine.forward_batch import ForwardBatch


class ModelRunner:
    def __init__(self, base: BaseModel, lora: LoRALayers) -> None:
        self.base = base
        self.lora = lora

    @torch.inference_mode()
    def execute(self, batch: ForwardBatch) -> Tensor:
        """Logits [num_logits, vocab] at `batch.logits_indices`; writes the new tokens' K and V into the cache."""
        device = self.base.device
        input_ids = torch.from_numpy(batch.input_ids).to(device)
        positions = torch.from_numpy(batch.positions).to(device)
        indices = torch.from_numpy(batch.logits_indices).to(device)
        lora = None if batch.lora is None else self.lora.ops.stage(batch.lora)
        with self.base.context.running(batch.attention), self.lora.applying(lora):
            return self.base.forward(input_ids, positions, indices)
