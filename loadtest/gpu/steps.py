"""Steps of the engine's runner on a whole model: decode and prefill, by how many adapters they mix.

eta is the base step's time over the LoRA step's, phi the most the extra bytes allow, rho the floor over the step's
time. A slow base step hides what adapters cost, so eta / phi means nothing without rho beside it.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from adapters.adapter_ref import AdapterUse
from loadtest.gpu.models import Sizes, load, random_adapter
from loadtest.gpu.timing import Ceilings, Device
from server.config import CacheConfig, EngineConfig, LoRALimits, ModelConfig, SchedulerConfig
from server.engine import kv_cache
from server.engine.base_model import BaseModel
from server.engine.cuda_graphs import CUDAGraphBackend
from server.engine.device_runner import DeviceRunner
from server.engine.engine import Engine
from server.engine.forward_batch import ForwardBatch, build_forward_batch
from server.engine.forward_extras import with_extras
from server.engine.request import Request, SamplingParams
from server.engine.runner_choice import Runner, device_runner
from server.engine.scheduler_output import ScheduledRow

Row = dict[str, Any]
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    model: str
    decode_rows: tuple[int, ...] = (32, 8)
    num_adapters: tuple[int, ...] = (1, 8, 32)
    context: int = 512  # tokens of each decode row
    chunk: int = 2048  # tokens of a prefill step
    prefill_adapters: tuple[int, ...] = (1, 4)
    lora_rank: int = 16

    @property
    def max_model_len(self) -> int:
        return max(self.context + 256, self.chunk)

    def config(self, base: BaseModel) -> EngineConfig:
        rows = max(self.decode_rows)
        blocks = rows * -(-self.max_model_len // BLOCK_SIZE)
        ranks = (max(*self.num_adapters, *self.prefill_adapters) + 1) * self.lora_rank  # one has DoRA
        each = sum(s.in_features + s.out_features for s in base.modules.linears.values()) * base.dtype.itemsize
        return EngineConfig(
            model=ModelConfig(skip_probe=True),  # random weights answer nothing; tests/gpu hold the path against PEFT
            cache=CacheConfig(
                block_size=BLOCK_SIZE,
                kv_cache_memory=blocks * kv_cache.block_bytes(base.kv_shapes, BLOCK_SIZE, base.dtype),
            ),
            scheduler=SchedulerConfig(max_num_seqs=rows, max_num_batched_tokens=max(self.chunk, 2 * rows)),
            lora=LoRALimits(lora_memory=ranks * each, max_lora_rank=self.lora_rank, cpu_lora_memory=64 << 30),
        )


class _NoLoRA:
    """Stands where LoRA layers stand, before the model has any."""

    num_rows = 1

    def applying(self, batch: object, *, extras: object = None, everywhere: bool) -> nullcontext[None]:
        assert batch is None and extras is None
        return nullcontext()


def measure_model(device: Device, ceilings: Ceilings, settings: StepSettings) -> tuple[list[Row], Row, Engine]:
    """A line per measured step, the figures of the start, and the engine, for whoever looks further."""
    base = load(settings.model, device.device, settings.max_model_len)
    config = settings.config(base)
    num_blocks = config.cache.kv_cache_memory // kv_cache.block_bytes(base.kv_shapes, BLOCK_SIZE, base.dtype)
    base.attach(kv_cache.allocate(base.kv_shapes, num_blocks, BLOCK_SIZE, base.dtype, base.device))
    lora_off = _measure_lora_off(device, base, config, settings)
    engine = Engine(config, base, look_ahead=device.is_cuda)
    rank, most = settings.lora_rank, _most(settings)
    models = [random_adapter(base.modules, i, rank, device.device) for i in range(most)]
    models.append(random_adapter(base.modules, most, rank, device.device, has_gains=True))
    for model in models:
        engine.load_adapter(model)
    uses = [AdapterUse(model.version) for model in models]
    engine.adapters.begin_step()
    assert engine.adapters.pin(tuple(uses)), "the pools are too small for the adapters"
    engine.adapters.activate()
    rows = []
    for num_rows in settings.decode_rows:
        rows += _decode(device, ceilings, settings, engine, uses, num_rows, lora_off[num_rows])
        rows.append(_one_with_gains(device, settings, engine, uses, num_rows))
    rows += _prefill(device, ceilings, settings, engine, uses)
    return rows, _start_figures(engine), engine


def _most(settings: StepSettings) -> int:
    return max(*settings.num_adapters, *settings.prefill_adapters)


def _start_figures(engine: Engine) -> Row:
    graphs = engine.runner.graphs if isinstance(engine.runner, DeviceRunner) else None
    return {
        "graphs": graphs.num_graphs if graphs else 0,
        "buckets": len(graphs.sizes) if graphs else 0,
        "capture_seconds": graphs.seconds if graphs else 0.0,
    }


def _measure_lora_off(
    device: Device, base: BaseModel, config: EngineConfig, settings: StepSettings
) -> dict[int, float]:
    """Seconds of a decode step of the model without any LoRA layers, by rows."""
    if not device.is_cuda:
        return dict.fromkeys(settings.decode_rows, float("nan"))
    runner = device_runner(config, base, _NoLoRA(), settings.max_model_len, CUDAGraphBackend())  # type: ignore[arg-type]
    assert runner.graphs is not None
    runner.capture(with_lora=False)
    found = {}
    for num_rows in settings.decode_rows:
        batch = build_forward_batch(requests_of(num_rows, settings.context, 1, []), BLOCK_SIZE, lambda _: ())
        found[num_rows] = device.interleaved({"off": _running(runner, batch)})["off"]
    return found


def requests_of(num_rows: int, context: int, num_new: int, uses: Sequence[AdapterUse]) -> list[ScheduledRow]:
    """Rows with `context` tokens behind them and `num_new` to compute; the adapters are dealt out in equal runs."""
    generator = torch.Generator().manual_seed(num_rows)
    blocks = -(-(context + num_new) // BLOCK_SIZE)
    num_prompt_tokens = context if num_new == 1 else context + num_new  # a single new token is one to decode
    found = []
    for row in range(num_rows):
        request = Request(
            request_id=str(row),
            prompt_token_ids=tuple(torch.randint(100, (num_prompt_tokens,), generator=generator).tolist()),
            sampling_params=SamplingParams(temperature=0.0),
            adapters=(uses[row * len(uses) // num_rows],) if uses else (),
            num_computed_tokens=context,
            block_table=list(range(row * blocks, (row + 1) * blocks)),
        )
        request.output_token_ids.extend([100] * (context + num_new - num_prompt_tokens))
        found.append(ScheduledRow(request, num_new))
    return found


def _running(runner: Runner, batch: ForwardBatch) -> Callable[[], object]:
    """A step as the engine runs it: staged, computed, the largest logit chosen, nothing read back."""
    return lambda: runner.execute(batch).argmax(-1)


def _decode(
    device: Device,
    ceilings: Ceilings,
    settings: StepSettings,
    engine: Engine,
    uses: Sequence[AdapterUse],
    num_rows: int,
    lora_off: float,
) -> list[Row]:
    mixes = [0, *(n for n in settings.num_adapters if n <= num_rows)]
    calls = {}
    for n in mixes:
        rows = requests_of(num_rows, settings.context, 1, uses[:n])
        calls[str(n)] = _running(engine.runner, build_forward_batch(rows, BLOCK_SIZE, engine.adapters.row_ranges))
    seconds = device.interleaved(calls)
    sizes = Sizes.of(engine.base)
    fixed = sizes.weight_bytes + num_rows * (settings.context + 1) * sizes.kv_bytes_per_token
    parameters = sizes.linear_parameters + sizes.head_parameters
    found = []
    for n in mixes:
        extra = 2 * n * settings.lora_rank * sizes.lora_values_per_rank
        lora_flops = 2 * num_rows * settings.lora_rank * sizes.lora_values_per_rank * (n > 0)
        floor = ceilings.floor(fixed + extra, 2 * num_rows * parameters + lora_flops)
        eta, phi = seconds["0"] / seconds[str(n)], fixed / (fixed + extra)
        found.append(
            {
                "model": settings.model, "step": "decode", "rows": num_rows, "adapters": n,
                "ms": 1e3 * seconds[str(n)], "floor_ms": 1e3 * floor, "rho": floor / seconds[str(n)],
                "eta": eta, "phi": phi, "eta_over_phi": eta / phi,
                "distinct_over_identical": seconds["1"] / seconds[str(n)] if n and "1" in seconds else None,
                "base_over_lora_off": lora_off / seconds["0"] if n == 0 else None,
            }
        )  # fmt: skip
    return found


def _one_with_gains(
    device: Device, settings: StepSettings, engine: Engine, uses: Sequence[AdapterUse], num_rows: int
) -> Row:
    """A decode step of one plain adapter a row, and the same with DoRA in the place of one of them: at most 5% more."""
    plain = list(uses[: min(num_rows, _most(settings))])
    calls = {}
    for name, chosen in (("plain", plain), ("dora", [*plain[:-1], uses[-1]])):
        rows = requests_of(num_rows, settings.context, 1, chosen)
        batch = build_forward_batch(rows, BLOCK_SIZE, engine.adapters.row_ranges)
        batch = with_extras(batch, engine.adapters.layers.extras, keeps_logits=engine.base.keeps_logits)
        assert (batch.extras is not None) is (name == "dora"), "the rows are not what they are taken for"
        calls[name] = _running(engine.runner, batch)
    seconds = device.interleaved(calls)
    return {
        "model": settings.model, "step": "decode, DoRA in one row", "rows": num_rows, "adapters": len(plain),
        "ms": 1e3 * seconds["dora"], "over_plain": seconds["dora"] / seconds["plain"],
    }  # fmt: skip


def _prefill(
    device: Device, ceilings: Ceilings, settings: StepSettings, engine: Engine, uses: Sequence[AdapterUse]
) -> list[Row]:
    """One chunk, cut into as many requests as the adapters that share it; base for each cut."""
    sizes = Sizes.of(engine.base)
    found = []
    for n in settings.prefill_adapters:
        calls = {}
        for name, chosen in (("base", ()), ("lora", uses[:n])):
            rows = requests_of(n, 0, settings.chunk // n, chosen)
            calls[name] = _running(engine.runner, build_forward_batch(rows, BLOCK_SIZE, engine.adapters.row_ranges))
        seconds = device.interleaved(calls)
        flops = 2 * settings.chunk * sizes.linear_parameters + 2 * n * sizes.head_parameters
        lora_flops = 2 * settings.chunk * settings.lora_rank * sizes.lora_values_per_rank
        floor = ceilings.floor(sizes.weight_bytes, flops + lora_flops)
        found.append(
            {
                "model": settings.model, "step": "prefill", "rows": n, "adapters": n,
                "ms": 1e3 * seconds["lora"], "floor_ms": 1e3 * floor, "rho": floor / seconds["lora"],
                "eta": seconds["base"] / seconds["lora"], "phi": flops / (flops + lora_flops),
                "eta_over_phi": seconds["base"] / seconds["lora"] * (flops + lora_flops) / flops,
            }
        )  # fmt: skip
    return found
