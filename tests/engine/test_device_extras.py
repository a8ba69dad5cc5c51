"""Adapters with extras through the runner of GPUs, on the CPU."""

from pathlib import Path

import pytest
import torch

from adapters import ops
from adapters.ops import reference_affine
from server.config import CacheConfig, EngineConfig, LoRALimits, SchedulerConfig
from server.engine.runner_choice import device_runner
from tests.engine import staged_reference
from tests.engine.extras_world import CHUNKS, Uses, draw_all, known_parts_of_every_base, prompt, saved, serve
from tests.engine.test_device_runner import FakeGraphBackend
from tests.equivalence.harness import EngineHarness

__all__ = ["known_parts_of_every_base"]
pytestmark = pytest.mark.usefixtures("known_parts")


def test_on_a_device_extras_run_outside_graphs(tmp_path: Path) -> None:
    """The runner of GPUs, on the CPU: a step with extras takes no graph, others go on taking theirs."""
    folder = saved("llama", tmp_path)
    _, adapters = draw_all(folder, torch.float32, ["plain", "dora", "norms", "ia3", "embedding_rows", "wider"])
    requests: dict[str, Uses] = {kind: [(kind, 1.0)] for kind in adapters}
    plain = serve(folder, "float32", adapters, requests, CHUNKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "select", lambda device: staged_reference.OPS)
        patch.setattr("adapters.lora_layers.select_affine", lambda device: reference_affine)
        harness = EngineHarness.open(folder, "float32", CHUNKS)
    engine, backend = harness.engine, FakeGraphBackend(None)
    engine.base.context.backend = staged_reference.attend
    config = EngineConfig(
        cache=CacheConfig(block_size=CHUNKS.block_size),
        scheduler=SchedulerConfig(max_num_seqs=4),
        lora=LoRALimits(max_lora_rank=8),
    )
    runner = device_runner(config, engine.base, engine.adapters.layers, 64, backend)
    runner.capture()
    engine.runner = runner
    harness._record_logits()
    replays = {}
    for kind, adapter in adapters.items():
        engine.load_adapter(adapter)
        before = sum(graph.num_replays for graph in backend.graphs)
        number = sum(map(ord, kind))
        harness.add(kind, prompt(number), adapter.version, max_tokens=6 + number % 5)
        harness.run()
        replays[kind] = sum(graph.num_replays for graph in backend.graphs) - before
        assert harness.tokens(kind) == plain.tokens(kind)
    assert replays.pop("plain") > 0 and set(replays.values()) == {0}
