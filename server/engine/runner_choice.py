"""Which runner serves a device, with which parts. Knows every runner and runs none."""

import importlib
import logging
from importlib.util import find_spec
from typing import Any, Protocol, cast

from torch import Tensor

from adapters.lora_layers import LoRALayers
from adapters.ops.gpu_affine_batch import AffineStaging
from adapters.ops.gpu_batch import LoRAStaging
from server.config import EngineConfig
from server.engine.attention_staging import AttentionStaging
from server.engine.base_model import BaseModel
from server.engine.cuda_graphs import CUDAGraphBackend, GraphBackend
from server.engine.device_runner import DeviceRunner
from server.engine.device_step import StagedParts
from server.engine.forward_batch import ForwardBatch
from server.engine.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs one step; see ModelRunner.execute."""

    def execute(self, batch: ForwardBatch, last_ids: Tensor | None = None) -> Tensor: ...


def choose_runner(config: EngineConfig, base: BaseModel, lora: LoRALayers, max_model_len: int) -> Runner:
    """On a GPU a DeviceRunner, its graphs captured unless eager steps are enforced; on a CPU with our kernels a
    RecordedRunner, with the same exception; elsewhere a ModelRunner."""
    if base.device.type != "cuda":
        return _recorded_runner(config, base, lora) or ModelRunner(base, lora)
    if find_spec("triton") is None:
        logger.warning("triton is not installed: attention and LoRA run in plain torch, many times slower")
        return ModelRunner(base, lora)
    graphs = None if config.model.enforce_eager else CUDAGraphBackend()
    runner = device_runner(config, base, lora, max_model_len, graphs)
    runner.capture()
    return runner


def _recorded_runner(config: EngineConfig, base: BaseModel, lora: LoRALayers) -> Runner | None:
    """None where decode steps are not to be recorded, or cannot be; a GPU machine need not have numba."""
    if config.model.enforce_eager or base.device.type != "cpu" or find_spec("numba") is None:
        return None
    recorded_runner: Any = importlib.import_module("server.engine.recorded_runner").RecordedRunner
    if not recorded_runner.serves(base):
        return None
    importlib.import_module("adapters.ops.page_toucher").touch_in_background(lora.pools)
    runner: Any = recorded_runner(base, lora)
    runner.try_out()
    return cast(Runner, runner) if runner.is_recording else None


def device_runner(
    config: EngineConfig, base: BaseModel, lora: LoRALayers, max_model_len: int, graphs: GraphBackend | None
) -> DeviceRunner:
    """A DeviceRunner with the GPU's parts; attention and LoRA of `base` and `lora` must be those of the GPU."""
    return DeviceRunner(
        base,
        lora,
        parts=StagedParts(
            attention=AttentionStaging(-(-max_model_len // config.cache.block_size)),
            lora=LoRAStaging(max_rank=min(config.lora.max_lora_rank, lora.num_rows)),
            affine=AffineStaging(),
        ),
        max_num_seqs=config.scheduler.max_num_seqs,
        graphs=graphs,
    )
