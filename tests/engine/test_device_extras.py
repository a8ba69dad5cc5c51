"""Adapters with extras through the runner of GPUs, on the CPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters import ops
from server.config import CacheConfig, EngineConfig, LoRALimits, SchedulerConfig
from server.engine.device_runner import DeviceRunner
from server.engine.device_step import HostBuffer
from server.engine.runner_choice import device_runner
from tests.engine import staged_reference
from tests.engine.extras_world import CHUNKS, Uses, draw_all, known_parts_of_every_base, prompt, saved, serve
from tests.engine.test_device_runner import FakeGraphBackend
from tests.equivalence.harness import EngineHarness, Squeeze
from tests.triton_interpreter import require_triton

__all__ = ["known_parts_of_every_base"]
pytestmark = pytest.mark.usefixtures("known_parts")

AFFINE_ALONE = ["dora", "norms"]  # served by graph
HOSTED = ["ia3", "embedding_rows", "wider"]


@dataclass
class Device:
    """An engine whose steps go through a DeviceRunner on the CPU."""

    harness: EngineHarness
    backend: FakeGraphBackend

    @classmethod
    def open(cls, folder: Path, squeeze: Squeeze, *, triton: bool = False) -> "Device":
        lora_ops: Any = staged_reference.OPS
        affine_ops: Any = staged_reference.AFFINE_OPS
        with pytest.MonkeyPatch.context() as patch:
            if triton:
                require_triton()
                affine_ops = ops.select_affine(torch.device("cuda"))
            patch.setattr(ops, "select", lambda device: lora_ops)
            patch.setattr("adapters.lora_layers.select_affine", lambda device: affine_ops)
            harness = EngineHarness.open(folder, "float32", squeeze)
        engine, backend = harness.engine, FakeGraphBackend(None)
        engine.base.context.backend = staged_reference.attend
        config = EngineConfig(
            cache=CacheConfig(block_size=squeeze.block_size),
            scheduler=SchedulerConfig(max_num_seqs=1 if triton else 4),
            lora=LoRALimits(max_lora_rank=8),
        )
        engine.runner = runner = device_runner(config, engine.base, engine.adapters.layers, 64, backend)
        runner.capture()
        harness._record_logits()
        return cls(harness, backend)

    @property
    def num_replays(self) -> int:
        return sum(graph.num_replays for graph in self.backend.graphs)


def test_on_a_device_hosted_extras_run_outside_graphs(tmp_path: Path) -> None:
    """The runner of GPUs, on the CPU: a step with affine vectors takes a graph of its own kind, one with other extras
    none, and others go on taking theirs."""
    folder = saved("llama", tmp_path)
    _, adapters = draw_all(folder, torch.float32, ["plain", *AFFINE_ALONE, *HOSTED])
    requests: dict[str, Uses] = {kind: [(kind, 1.0)] for kind in adapters}
    plain = serve(folder, "float32", adapters, requests, CHUNKS)
    device = Device.open(folder, CHUNKS)
    replays, affine_replays = {}, {}
    for kind, adapter in adapters.items():
        device.harness.engine.load_adapter(adapter)
        before = device.num_replays, sum(graph.num_replays for graph in device.backend.graphs[6:])
        number = sum(map(ord, kind))
        device.harness.add(kind, prompt(number), adapter.version, max_tokens=6 + number % 5)
        device.harness.run()
        replays[kind] = device.num_replays - before[0]
        affine_replays[kind] = sum(graph.num_replays for graph in device.backend.graphs[6:]) - before[1]
        assert device.harness.tokens(kind) == plain.tokens(kind)
    assert replays["plain"] > 0 and affine_replays["plain"] == 0
    assert all(replays[kind] == affine_replays[kind] > 0 for kind in AFFINE_ALONE)
    assert not any(replays[kind] for kind in HOSTED)


def test_graphs_serve_rows_with_vectors_beside_others(tmp_path: Path) -> None:
    """Rows that come and go, with a composition, an adapter without pairs and base rows: tokens are the plain runner's,
    most of them from graphs, since each row's tokens are where the buffer says."""
    folder = saved("llama", tmp_path)
    _, adapters = draw_all(folder, torch.float32, ["plain", "dora", "norms", "dora_and_bias"])
    requests: dict[str, Uses] = {
        "base": [],
        "plain": [("plain", 1.0)],
        "dora": [("dora", 0.5)],
        "both": [("norms", 1.0), ("dora_and_bias", -0.7)],
        "norms": [("norms", 1.0)],
        "last": [],
    }
    squeeze = Squeeze(max_num_batched_tokens=40, max_num_seqs=4, block_size=4)
    plain = serve(folder, "float32", adapters, requests, squeeze)
    device = Device.open(folder, squeeze)
    for adapter in adapters.values():
        device.harness.engine.load_adapter(adapter)
    for name, uses in requests.items():
        found = [device.harness.use(adapters[kind].version, weight) for kind, weight in uses]
        number = sum(map(ord, name))
        device.harness.add(name, prompt(number), *sorted(found, key=lambda use: use.version), max_tokens=6 + number % 5)
    device.harness.run()
    for name in requests:
        assert device.harness.tokens(name) == plain.tokens(name), name
    assert sum(graph.num_replays for graph in device.backend.graphs[6:]) > 5


def test_triton_kernels_give_the_same_logits(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    _, adapters = draw_all(folder, torch.float32, ["dora_and_bias"])
    adapter = adapters["dora_and_bias"]
    squeeze = Squeeze(max_num_batched_tokens=40, max_num_seqs=1, block_size=4)
    plain = EngineHarness.open(folder, "float32", squeeze)
    plain._record_logits()
    device = Device.open(folder, squeeze, triton=True)
    for harness in (plain, device.harness):
        harness.engine.load_adapter(adapter)
        harness.add("r", range(3, 6), adapter.version, max_tokens=3)
        harness.run()
    assert device.harness.tokens("r") == plain.tokens("r")
    want = plain.chosen_logits("r")
    torch.testing.assert_close(device.harness.chosen_logits("r"), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert [graph.num_replays for graph in device.backend.graphs] == [0, 0, 2]


def test_a_step_without_vectors_sends_what_it_did_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes sent of decode steps of each kind: those of affine vectors come last and with them alone."""
    folder = saved("llama", tmp_path)
    _, adapters = draw_all(folder, torch.float32, ["plain", "dora"])
    device = Device.open(folder, CHUNKS)
    runner = device.harness.engine.runner
    assert isinstance(runner, DeviceRunner)
    layout = runner._step._layout(runner._caps[1])
    sent: list[int] = []
    send = HostBuffer.send

    def count(self: HostBuffer, target: Tensor) -> None:
        sent.append(len(target))
        send(self, target)

    monkeypatch.setattr(HostBuffer, "send", count)
    for kind in (None, "plain", "dora"):
        uses = []
        if kind is not None:
            device.harness.engine.load_adapter(adapters[kind])
            uses.append(adapters[kind].version)
        device.harness.add(str(kind), range(3, 6), *uses, max_tokens=3)
        device.harness.run()
    ends = [layout.end_of(part) for part in ("attention", "lora", "affine")]
    assert sent[1::3] == sent[2::3] == ends and ends == sorted(set(ends))
    assert np.diff(ends)[1] <= 4 * 32, "a row with one entry"
