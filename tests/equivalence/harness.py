"""A real engine on a real (tiny) model that keeps the logits of every sampled token, for holding against the oracle."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter_ref import AdapterUse, AdapterVersion
from adapters.checkpoint import CheckpointLimits, load_lora_model
from server.config import CacheConfig, EngineConfig, LoRALimits, ModelConfig, SchedulerConfig
from server.engine.base_model import load_base_model
from server.engine.engine import Engine
from server.engine.forward_batch import ForwardBatch
from server.engine.kv_cache import block_bytes
from server.engine.request import Request, RequestOutput, SampledToken, SamplingParams

LIMITS = CheckpointLimits(max_lora_rank=256, max_adapter_bytes=1 << 30)


@dataclass(frozen=True, kw_only=True)
class Squeeze:
    """Limits that force the hard paths: small steps chunk prompts, few blocks preempt."""

    max_num_batched_tokens: int = 24
    max_num_seqs: int = 8
    num_blocks: int | None = None  # None = plenty
    block_size: int = 4
    lora_memory: int = 64 << 20
    max_loras: int | None = None
    max_cpu_loras: int | None = None
    max_bypassed_steps: int = 256


def open_engine(
    folder: Path,
    dtype: str,
    squeeze: Squeeze,
    *,
    num_token_ids: int | None = None,
    look_ahead: bool = False,
    device: str = "cpu",
    use_graphs: bool = True,
) -> Engine:
    """A real engine on the model in `folder`, under the limits of `squeeze`."""
    base = load_base_model(folder, folder.name, ModelConfig(dtype=dtype, device=device))
    each = block_bytes(base.kv_shapes, squeeze.block_size, base.dtype)
    config = EngineConfig(
        model=ModelConfig(enforce_eager=not use_graphs),
        cache=CacheConfig(block_size=squeeze.block_size, kv_cache_memory=each * (squeeze.num_blocks or 1024)),
        scheduler=SchedulerConfig(
            max_num_seqs=squeeze.max_num_seqs,
            max_num_batched_tokens=squeeze.max_num_batched_tokens,
            max_bypassed_steps=squeeze.max_bypassed_steps,
        ),
        lora=LoRALimits(
            lora_memory=squeeze.lora_memory, max_loras=squeeze.max_loras, max_cpu_loras=squeeze.max_cpu_loras
        ),
    )
    return Engine(config, base, num_token_ids=num_token_ids, look_ahead=look_ahead)


@dataclass
class EngineHarness:
    """Runs requests to their end. `logits[request_id][i]` are those output token i was chosen from."""

    engine: Engine
    logits: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    outputs: dict[str, list[RequestOutput]] = field(default_factory=lambda: defaultdict(list))
    requests: dict[str, Request] = field(default_factory=dict)
    max_step_adapters: int = 0
    num_segments: int = 0  # LoRA runs that went through matrix products

    @classmethod
    def open(
        cls,
        folder: Path,
        dtype: str,
        squeeze: Squeeze | None = None,
        *,
        num_token_ids: int | None = None,
        look_ahead: bool = False,
        device: str = "cpu",
        use_graphs: bool = True,
    ) -> "EngineHarness":
        engine = open_engine(
            folder,
            dtype,
            squeeze or Squeeze(),
            num_token_ids=num_token_ids,
            look_ahead=look_ahead,
            device=device,
            use_graphs=use_graphs,
        )
        harness = cls(engine)
        harness._record_logits()
        return harness

    def _record_logits(self) -> None:
        sample = self.engine.sampler.sample

        def recording(logits: Tensor, requests: Sequence[Request]) -> list[SampledToken | None]:
            for row, request in zip(logits, requests, strict=True):
                self.logits[request.request_id][request.num_output_tokens] = row.float().clone()
            return sample(logits, requests)

        self.engine.sampler.sample = recording  # type: ignore[method-assign]
        execute = self.engine.runner.execute

        def counting(batch: ForwardBatch, last_ids: Tensor | None = None) -> Tensor:
            self.num_segments += len(batch.lora.segments) if batch.lora else 0
            return execute(batch, last_ids)

        self.engine.runner.execute = counting  # type: ignore[method-assign]

    def load(self, folder: Path) -> AdapterVersion:
        base = self.engine.base
        model = load_lora_model(folder, base.modules, limits=LIMITS, dtype=base.dtype, weights=base.weights).model
        self.engine.load_adapter(model)
        return model.version

    @staticmethod
    def use(version: AdapterVersion, weight: float = 1.0) -> AdapterUse:
        return AdapterUse(version, weight)

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        *uses: AdapterUse | AdapterVersion,
        stop_ids: frozenset[int] = frozenset(),
        num_token_ids: int | None = None,
        **sampling: object,
    ) -> Request:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 64, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling_params=params,
            stop_ids=stop_ids,
            adapters=tuple(use if isinstance(use, AdapterUse) else AdapterUse(use) for use in uses),
            num_token_ids=num_token_ids,
        )
        self.requests[request_id] = request
        self.engine.add_request(request)
        return request

    def engine_step(self) -> None:
        result = self.engine.step()
        self.max_step_adapters = max(self.max_step_adapters, result.stats.num_step_adapters)
        for output in result.outputs:
            self.outputs[output.request_id].append(output)

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.engine_step()
        assert not self.engine.has_work, f"requests still live after {max_steps} steps"
        self.engine.check_integrity()
        for request_id in self.requests:
            terminal = [o for o in self.outputs[request_id] if o.finish_reason is not None]
            assert len(terminal) == 1, f"{request_id} has {len(terminal)} terminal outputs"

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.new_token_ids]

    def chosen_logits(self, request_id: str) -> Tensor:
        """[num_output_tokens, vocab], on the CPU; recorded without look-ahead only."""
        rows = self.logits[request_id]
        return torch.stack([rows[i] for i in range(len(rows))]).cpu()
