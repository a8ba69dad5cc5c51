"""Decode steps in which one row's adapter has more than low-rank pairs, beside the same steps with plain adapters.

The engine's own runner runs both in turns, a pair at a time, so that a disturbance meets both; the ratio is the median
over the pairs. Kernels and tensors are those of a served step, sampling left out. One round before the first makes sure
that what is timed is recorded where the engine records.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.adapter_extras import NO_EXTRAS, AdapterExtras, EmbeddingAdapter, HeadAdapter, TokenRows
from adapters.adapter_ref import AdapterUse, AdapterVersion
from adapters.lora_batch import LoRABatch
from adapters.lora_layers import LoRALayers
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.packed_modules import PackedModules
from loadtest.extras import ExtrasSettings
from loadtest.gpu.report import table
from loadtest.peers_endpoints import Programs
from loadtest.peers_versions import versions_of
from loadtest.report import describe_machine
from server.config import CacheConfig, EngineConfig, LoRALimits, ModelConfig, SchedulerConfig
from server.default_model import default_model_folder
from server.engine import kv_cache
from server.engine.attention.interface import AttentionMetadata
from server.engine.base_model import BaseModel, load_base_model
from server.engine.engine import Engine
from server.engine.forward_batch import ForwardBatch
from server.engine.forward_extras import with_extras

MAX_RATIO = 1.05
PLAIN = "plain LoRA"
CHECKED = ("DoRA", "bias", "norms")
_BLOCK_SIZE = 16
_TOKENS = 10  # trained ones
_WARM_UP = 3  # steps: by the model's code, recorded, played


class Draw:
    """Adapters of small random numbers for one base."""

    def __init__(self, base: BaseModel, lora_rank: int) -> None:
        self._model, self._modules, self._dtype = base.model, base.modules, base.dtype
        self._rank = lora_rank
        self._generator = torch.Generator().manual_seed(0)
        head = base.modules.head.name if base.modules.head else None
        self._linears = {name: shape for name, shape in base.modules.linears.items() if name != head}

    def normal(self, *shape: int, std: float = 0.02) -> Tensor:
        return torch.randn(shape, generator=self._generator) * std

    def model(self, name: str, extras: AdapterExtras = NO_EXTRAS, *, in_head: bool = False) -> LoRAModel:
        pairs = {n: self.pair(shape.in_features, shape.out_features) for n, shape in self._linears.items()}
        head = self._modules.head
        if in_head and head is not None:
            pairs[head.name] = self.pair(head.in_features, head.out_features)
        return LoRAModel(AdapterVersion(name), PackedModules.of(pairs), extras=extras)

    def pair(self, in_features: int, out_features: int) -> LoRAWeights:
        a, b = self.normal(self._rank, in_features), self.normal(self._rank, out_features)
        return LoRAWeights(a.to(self._dtype), b.to(self._dtype))

    def of_outputs(self, mean: float) -> dict[str, Tensor]:
        return {name: mean + self.normal(shape.out_features) for name, shape in self._linears.items()}

    def norms(self) -> dict[str, Tensor]:
        found = {}
        for name, shape in self._modules.norms.items():
            weight: Any = self._model.get_submodule(name).weight
            found[f"{name}.weight"] = weight.float() * (1 + self.normal(*shape.shape))
        return found

    def kinds(self) -> dict[str, LoRAModel]:
        """What may differ in one row, as far as the base has it."""
        found = {
            "DoRA": self.model("dora", AdapterExtras(gains=self.of_outputs(1.0))),
            "bias": self.model("bias", AdapterExtras(biases=self.of_outputs(0.0))),
            "norms": self.model("norms", AdapterExtras(norms=self.norms())),
        }
        lookup, head = self._modules.embedding, self._modules.head
        if lookup is None or head is None:
            return found
        rows = TokenRows(torch.arange(_TOKENS), self.normal(_TOKENS, lookup.width).to(self._dtype))
        pair = self.pair(lookup.num_rows, lookup.width)
        looked_up = EmbeddingAdapter(pair.lora_a.T.contiguous(), pair.lora_b)
        trained = AdapterExtras(embedding=EmbeddingAdapter(rows=rows), head=HeadAdapter(rows=rows))
        full = HeadAdapter(weight=self.normal(head.out_features, head.in_features).to(self._dtype))
        return found | {
            "LoRA on the embedding": self.model("embedding", AdapterExtras(embedding=looked_up)),
            f"{_TOKENS} trained tokens": self.model("tokens", trained),
            "LoRA on the head": self.model("head", in_head=True),
            "a head of its own": self.model("full", AdapterExtras(head=full)),
        }


@dataclass(frozen=True)
class Steps:
    """An engine with adapters in its pools, and batches that run again and again."""

    engine: Engine
    plain: list[LoRAModel]
    settings: ExtrasSettings

    @classmethod
    def open(cls, settings: ExtrasSettings) -> tuple["Steps", dict[str, LoRAModel]]:
        folder = settings.model or default_model_folder()
        base = load_base_model(Path(folder), "base", ModelConfig(cpu_threads=settings.threads))
        draw = Draw(base, settings.lora_rank)
        plain, kinds = [draw.model(f"plain {i}") for i in range(settings.adapters)], draw.kinds()
        engine = Engine(_config(settings, base, len(plain) + len(kinds)), base)
        for model in (*plain, *kinds.values()):
            engine.load_adapter(model)
        engine.adapters.begin_step()
        uses = tuple(AdapterUse(model.version) for model in (*plain, *kinds.values()))
        assert engine.adapters.pin(uses), "the pools are too small for the adapters"
        engine.adapters.activate()
        return cls(engine, plain, settings), kinds

    def batch(self, other: LoRAModel | None) -> ForwardBatch:
        """Decode rows that share the plain adapters, one of them with `other` in place of its own."""
        rows, context = self.settings.rows, self.settings.context
        versions = [self.plain[row % len(self.plain)].version for row in range(rows)]
        if other is not None:
            versions[rows // 2] = other.version
        ranges = [self.engine.adapters.row_ranges((AdapterUse(version),)) for version in versions]
        per_row = -(-context // _BLOCK_SIZE)
        tables = np.arange(rows * per_row, dtype=np.int32).reshape(rows, per_row)
        batch = ForwardBatch(
            input_ids=np.arange(1, rows + 1) % self.engine.base.vocab_size,
            positions=np.full(rows, context - 1),
            logits_indices=np.arange(rows),
            sampled=(),
            prompt_logprobs=(),
            attention=AttentionMetadata(
                query_starts=np.arange(rows + 1, dtype=np.int32),
                context_lens=np.full(rows, context, np.int32),
                block_tables=tables,
                slot_mapping=tables[:, -1].astype(np.int64) * _BLOCK_SIZE + (context - 1) % _BLOCK_SIZE,
                num_decode_rows=rows,
            ),
            lora=LoRABatch.build([1] * rows, ranges, is_prompt=[False] * rows),
        )
        return with_extras(batch, self.engine.adapters.layers.extras, keeps_logits=self.engine.base.keeps_logits)

    def timed(self, batch: ForwardBatch) -> Callable[[], float]:
        """Seconds of one step, warmed up."""

        def run() -> float:
            began = time.perf_counter()
            self.engine.runner.execute(batch)
            return time.perf_counter() - began

        for _ in range(_WARM_UP):
            run()
        return run


def measure(settings: ExtrasSettings) -> int:
    """Print, write; 1 when a checked kind is over its limit."""
    load = os.getloadavg()[0]
    steps, kinds = Steps.open(settings)
    plain = steps.timed(steps.batch(None))
    runs = {kind: steps.timed(steps.batch(model)) for kind, model in kinds.items()}
    pairs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in runs}
    for _ in range(settings.rounds):
        for kind, run in runs.items():
            pairs[kind].append((plain(), run()))
    lines = [line(kind, found) for kind, found in pairs.items()]
    record = _record(settings, lines, load)
    page = _page(record)
    print(f"\n{page}")
    _write(settings, record, page)
    over = [each["one row has"] for each in lines if each["holds"] is False]
    if settings.check and over:
        print(f"FAILED: steps with one row of {', '.join(over)} take over {MAX_RATIO:g} × those of {PLAIN}")
        return 1
    return 0


def line(kind: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Of pairs of seconds, plain and with one row of `kind`."""
    ratio = statistics.median(other / plain for plain, other in pairs)
    is_checked = kind in CHECKED
    return {
        "one row has": kind,
        f"ms, {PLAIN}": 1e3 * statistics.median(plain for plain, _ in pairs),
        "ms": 1e3 * statistics.median(other for _, other in pairs),
        "ratio": ratio,
        "limit": MAX_RATIO if is_checked else None,
        "holds": ratio <= MAX_RATIO if is_checked else None,
    }


def _config(settings: ExtrasSettings, base: BaseModel, num_adapters: int) -> EngineConfig:
    blocks = settings.rows * -(-settings.context // _BLOCK_SIZE)
    row_bytes = LoRALayers.bytes_per_row(base.modules, base.dtype)
    return EngineConfig(
        model=ModelConfig(skip_probe=True),  # tests hold what is computed against PEFT
        cache=CacheConfig(
            block_size=_BLOCK_SIZE,
            kv_cache_memory=blocks * kv_cache.block_bytes(base.kv_shapes, _BLOCK_SIZE, base.dtype),
        ),
        scheduler=SchedulerConfig(max_num_seqs=settings.rows),
        lora=LoRALimits(lora_memory=num_adapters * settings.lora_rank * row_bytes, max_lora_rank=settings.lora_rank),
    )


def _record(settings: ExtrasSettings, lines: list[dict[str, Any]], load: float) -> dict[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": versions_of((), Programs()),
        "command": "python -m loadtest " + " ".join(sys.argv[1:]),
        "rows": settings.rows,
        "adapters": settings.adapters,
        "lora_rank": settings.lora_rank,
        "context": settings.context,
        "rounds": settings.rounds,
        "load_before": load,
        "kinds": lines,
    }


def _page(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# One row with more than low-rank pairs",
        "",
        f"{record['when']}; {record['machine']}, load {record['load_before']:.1f} before; {versions}. "
        f"`{record['command']}`",
        "",
        f"A decode step of {record['rows']} rows and {record['context']} tokens of context, with {record['adapters']} "
        f"adapters of rank {record['lora_rank']} on every linear, beside the same step in which the adapter of one row "
        f"has something more. {record['rounds']} pairs of steps in turns; the ratio is the median of the pairs'.",
        "",
        *table(record["kinds"]),
    ]
    return "\n".join(lines) + "\n"


def _write(settings: ExtrasSettings, record: dict[str, Any], page: str) -> None:
    settings.results.mkdir(parents=True, exist_ok=True)
    path = settings.results / datetime.now(UTC).strftime("extras-%Y%m%d-%H%M%S.json")
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(page)
    print(f"Written to {path}")
    if settings.publish is not None:
        settings.publish.parent.mkdir(parents=True, exist_ok=True)
        settings.publish.write_text(page)
