"""Which runner serves a device. Knows every runner and runs none."""

from typing import Protocol

from torch import Tensor

from adapters.lora_layers import LoRALayers
from server.config import EngineConfig
from server.engine.base_model import BaseModel
from server.engine.forward_batch import ForwardBatch
from server.engine.model_runner import ModelRunner


class Runner(Protocol):
    """Runs one step; see ModelRunner.execute."""

    def execute(self, batch: ForwardBatch, last_ids: Tensor | None = None) -> Tensor: ...


def choose_runner(
    config: EngineConfig, base: BaseModel, lora: LoRALayers, max_model_len: int, *, use_graphs: bool
) -> Runner:
    return ModelRunner(base, lora)
