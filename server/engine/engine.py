"""The engine: requests in, one step at a time, outputs out. Single-threaded; owns scheduler, blocks, pools, model.

`step()` is the whole system: schedule → activate adapters → forward → sample → update. With look-ahead a step is only
launched, and its tokens are read one call later, while the device runs the next. Knows no names, no text, no wire:
adapters are versions, tokens are ids. A step that raises ends the requests it held with an error and nothing else; a
row whose logits are not finite ends alone.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from adapters import ops
from adapters.adapter_ref import AdapterVersion
from adapters.host_cache import HostCache
from adapters.lora_layers import LoRALayers
from adapters.lora_model import LoRAModel
from adapters.residency import AdapterResidency
from adapters.row_range_pool import RowRangePool
from server.config import EngineConfig
from server.engine import kv_cache, probe
from server.engine.base_model import BaseModel
from server.engine.block_manager import BlockManager
from server.engine.device_sampler import DeviceSampler, TokensUnderWay, samples_on_device
from server.engine.forward_batch import ForwardBatch, build_forward_batch
from server.engine.forward_extras import with_extras
from server.engine.prompt_logprobs import PromptLogprobs
from server.engine.request import EngineStats, Request, RequestOutput, SampledToken, TokenLogprob
from server.engine.runner_choice import Runner, choose_runner
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.scheduler_output import ScheduledRow, SchedulerOutput
from server.errors import BadRequest

logger = logging.getLogger(__name__)

_NOT_FINITE = "the model gave no finite logits for this request; is its adapter sound?"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Bytes given to each part, for the start-up panel and the metrics."""

    weights: int
    kv_cache: int
    lora_pools: int
    num_blocks: int
    lora_rows: int  # pool rows; an adapter takes as many as its rank


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    outputs: tuple[RequestOutput, ...]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step launched whose tokens have not been read."""

    scheduled: SchedulerOutput
    sampled: tuple[Request, ...]
    tokens: TokensUnderWay

    @property
    def row_of(self) -> dict[str, int]:
        """Request id → row of the sampled tokens."""
        return {request.request_id: row for row, request in enumerate(self.sampled)}


class Engine:
    """`num_token_ids` is how many ids the tokenizer has, when the model has more (rows of padding are never chosen).

    `look_ahead` schedules a step before the tokens of the one under way are known; None = on a GPU, where it hides
    the host's work. It changes no token.
    """

    def __init__(
        self,
        config: EngineConfig,
        base: BaseModel,
        *,
        num_token_ids: int | None = None,
        look_ahead: bool | None = None,
    ) -> None:
        if not config.model.skip_probe:
            probe.check(base)
        self.base = base
        self.memory = _plan_memory(config, base)
        block_size = config.cache.block_size
        base.attach(kv_cache.allocate(base.kv_shapes, self.memory.num_blocks, block_size, base.dtype, base.device))
        layers = LoRALayers(base.model, base.modules, num_rows=self.memory.lora_rows, ops=ops.select(base.device))
        host = HostCache(max_bytes=config.lora.cpu_lora_memory, max_adapters=config.lora.max_cpu_loras)
        max_extra_bytes = config.lora.lora_extras_memory if layers.sizes.has_own_memory else None
        pool = RowRangePool(self.memory.lora_rows, max_loras=config.lora.max_loras, max_extra_bytes=max_extra_bytes)
        self.adapters = AdapterResidency(host, pool, layers)
        self.blocks = BlockManager(self.memory.num_blocks, block_size, config.cache.enable_prefix_caching)
        self.max_model_len = _max_model_len(config, base, self.memory.num_blocks * block_size)
        self.scheduler = Scheduler(config.scheduler, self.blocks, self.adapters, self.max_model_len)
        self.num_token_ids = min(num_token_ids or base.vocab_size, base.vocab_size)
        self.sampler = Sampler(base.vocab_size, allowed_size=self.num_token_ids)
        self.runner: Runner = choose_runner(config, base, layers, self.max_model_len)
        is_ahead = base.device.type == "cuda" if look_ahead is None else look_ahead
        max_num_seqs = config.scheduler.max_num_seqs
        self.device_sampler = DeviceSampler(self.num_token_ids, max_num_seqs, base.device) if is_ahead else None
        self._in_flight: _InFlight | None = None
        self._prompt_logprobs = PromptLogprobs(self.sampler)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None

    def add_request(self, request: Request) -> None:
        """Admit a request; raises what Scheduler.add raises when it could never run, and BadRequest for an id that
        is no token: one such row would fail the whole step it is in."""
        for use in request.adapters:
            self.adapters.model(use.version)  # a version nobody loaded is a fault of ours: fail here, not in a step
        num_token_ids = self.sampler.num_token_ids(request)
        if not all(0 <= token_id < num_token_ids for token_id in request.prompt_token_ids):
            raise BadRequest(f"the prompt has token ids outside [0, {num_token_ids})", param="prompt")
        self.scheduler.add(request)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, in any state; None when it already ended."""
        self._forget(request_id)
        return self.scheduler.abort(request_id)

    def load_adapter(self, model: LoRAModel) -> None:
        self.adapters.load(model)

    def unload_adapter(self, version: AdapterVersion) -> None:
        """Free a version in host and device memory; RuntimeError, and nothing freed, while a request still uses it."""
        stats = self.scheduler.stats()
        if version in stats.running_versions or version in stats.waiting_versions:
            raise RuntimeError(f"adapter version {version} is in use: a lease was given back before its request ended")
        self.adapters.unload(version)

    def step(self) -> StepResult:
        """Run one step. Never raises for what a request or adapter did; those requests end with an error."""
        scheduled = self.scheduler.schedule()
        for request_id in scheduled.preempted:  # they compute their prompt again
            self._prompt_logprobs.forget(request_id)
        outputs: list[RequestOutput] = []
        before = self._take_in_flight()
        launches = self._launches(scheduled)
        if before is not None and not launches:  # what follows needs its tokens on the host
            self._receive(before, outputs)
            before, scheduled = None, scheduled.still_running()
        if launches:
            self._attempt(scheduled, outputs, lambda: self._launch(scheduled, before))
        else:
            self._attempt(scheduled, outputs, lambda: self._run(scheduled, outputs))
        if before is not None:
            self._receive(before, outputs)
        if self._in_flight is not None:
            self.scheduler.advance(self._in_flight.scheduled)
        for output in outputs:
            if output.finish_reason is not None:
                self._forget(output.request_id)
        return StepResult(outputs=tuple(outputs), stats=self.stats(scheduled))

    def _attempt(self, scheduled: SchedulerOutput, outputs: list[RequestOutput], part: Callable[[], None]) -> None:
        """Do a part of a step; should it raise, the requests of that step end with an error."""
        try:
            part()
        except Exception:
            logger.exception("a step of %d rows failed; its requests end with an error", len(scheduled.rows))
            live = [row.request.request_id for row in scheduled.rows if not row.request.status.is_finished]
            outputs += self._fail(live, "the engine failed in a step")

    def stats(self, scheduled: SchedulerOutput | None = None) -> EngineStats:
        """The engine now; `scheduled` is the step just run, None between steps."""
        return replace(
            self.scheduler.stats(scheduled),
            active_versions=self.adapters.active_versions,
            num_activations=self.adapters.num_activations,
            num_device_evictions=self.adapters.pool.num_evictions,
            num_free_lora_rows=self.adapters.pool.num_free_rows,
            num_lora_extra_bytes=self.adapters.pool.num_extra_bytes,
        )

    def _launches(self, scheduled: SchedulerOutput) -> bool:
        """Whether a step can be left under way: every row samples on the device."""
        rows = scheduled.rows
        return self.device_sampler is not None and bool(rows) and all(samples_on_device(row.request) for row in rows)

    def _launch(self, scheduled: SchedulerOutput, before: _InFlight | None) -> None:
        """Send a step to the device and wait for nothing; tokens that `before` samples are taken over there."""
        assert self.device_sampler is not None
        self.adapters.activate()
        pending = before.row_of if before else None
        batch = self._batch(scheduled.rows, pending)
        logits = self.runner.execute(batch, self.device_sampler.last_ids)
        tokens = self.device_sampler.launch(logits[: len(batch.sampled)], batch.sampled)
        self._in_flight = _InFlight(scheduled, batch.sampled, tokens)

    def _batch(self, rows: Sequence[ScheduledRow], pending: Mapping[str, int] | None = None) -> ForwardBatch:
        """The arrays of a step whose adapters are activated."""
        batch = build_forward_batch(rows, self.blocks.block_size, self.adapters.row_ranges, pending)
        return with_extras(batch, self.adapters.layers.extras, keeps_logits=self.base.keeps_logits)

    def _take_in_flight(self) -> _InFlight | None:
        step, self._in_flight = self._in_flight, None
        return step

    def _receive(self, step: _InFlight, outputs: list[RequestOutput]) -> None:
        """Wait for the tokens of a step launched before, and take them in."""
        self._attempt(step.scheduled, outputs, lambda: self._read(step, outputs))

    def _read(self, step: _InFlight, outputs: list[RequestOutput]) -> None:
        pairs = [*zip(step.sampled, step.tokens.read(), strict=True)]
        broken = [r.request_id for r, token_id in pairs if token_id is None and not r.status.is_finished]
        outputs += self._fail(broken, _NOT_FINITE)
        sampled = {r.request_id: SampledToken(token_id) for r, token_id in pairs if token_id is not None}
        outputs += self.scheduler.update(step.scheduled, sampled)

    def _run(self, scheduled: SchedulerOutput, outputs: list[RequestOutput]) -> None:
        """Append the step's outputs to `outputs`, so that those already made outlive an exception after them."""
        sampled: dict[str, SampledToken] = {}
        prompt_logprobs: dict[str, tuple[TokenLogprob | None, ...]] = {}
        if scheduled.rows:
            self.adapters.activate()
            batch = self._batch(scheduled.rows)
            logits = self.runner.execute(batch)
            sampled, broken = self._sample(batch, logits)
            broken += self._prompt_logprobs.collect(batch, logits)
            outputs += self._fail(broken, _NOT_FINITE)
            prompt_logprobs = self._prompt_logprobs.take_finished(scheduled)
        outputs += self.scheduler.update(scheduled, sampled, prompt_logprobs)

    def _sample(self, batch: ForwardBatch, logits: Tensor) -> tuple[dict[str, SampledToken], list[str]]:
        """The chosen token of every sampled row by request id, and the requests whose logits were not finite."""
        if not batch.sampled:
            return {}, []
        tokens = self.sampler.sample(logits[: len(batch.sampled)], batch.sampled)
        pairs = list(zip(batch.sampled, tokens, strict=True))
        good = {request.request_id: token for request, token in pairs if token is not None}
        return good, [request.request_id for request, token in pairs if token is None]

    def _fail(self, request_ids: Sequence[str], message: str) -> list[RequestOutput]:
        return self.scheduler.fail(request_ids, message) if request_ids else []

    def _forget(self, request_id: str) -> None:
        self._prompt_logprobs.forget(request_id)
        self.sampler.forget(request_id)

    def check_integrity(self) -> None:
        """Assert that blocks, queues, host cache and row ranges agree; run when idle and after each test."""
        self.scheduler.check_integrity()
        self.blocks.check_integrity()
        self.adapters.check_integrity()


def _max_model_len(config: EngineConfig, base: BaseModel, capacity: int) -> int:
    """Tokens one sequence may have: the model's limit, or what the whole KV cache holds if that is less."""
    if config.model.max_model_len is not None and config.model.max_model_len > capacity:
        raise ValueError(
            f"--max-model-len {config.model.max_model_len} is over the {capacity} tokens that --kv-cache-memory "
            f"{config.cache.kv_cache_memory} bytes holds; lower the one or raise the other"
        )
    return min(base.max_model_len, capacity)


def _plan_memory(config: EngineConfig, base: BaseModel) -> EngineMemory:
    """How many KV blocks and pool rows the budgets buy; a KV block more than every row's longest sequence is idle."""
    block_size = config.cache.block_size
    each = kv_cache.block_bytes(base.kv_shapes, block_size, base.dtype)
    bought = kv_cache.num_blocks_for(base.kv_shapes, block_size, base.dtype, config.cache.kv_cache_memory)
    per_sequence = -(-base.max_model_len // block_size)
    num_blocks = min(bought, per_sequence * config.scheduler.max_num_seqs)
    row_bytes = LoRALayers.bytes_per_row(base.modules, base.dtype)
    lora_rows = config.lora.lora_memory // row_bytes
    if lora_rows < 1:
        raise ValueError(f"--lora-memory {config.lora.lora_memory} bytes is less than one rank ({row_bytes} bytes)")
    return EngineMemory(
        weights=base.weight_bytes,
        kv_cache=num_blocks * each,
        lora_pools=lora_rows * row_bytes,
        num_blocks=num_blocks,
        lora_rows=lora_rows,
    )
