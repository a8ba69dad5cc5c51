"""Adapters with extras of every kind on a CUDA device, against the base's own code on other weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.cuda_graphs import DecodeGraphs
from server.engine.device_runner import DeviceRunner
from tests.adapters.drawn_extras import KINDS
from tests.engine.extras_world import CHUNKS, Uses, chosen, draw_all, known_parts_of_every_base, saved, serve, wanted
from tests.equivalence.harness import EngineHarness

__all__ = ["known_parts_of_every_base"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("known_parts"),
]


def check(folder: Path, architecture: str, device: str, *, use_graphs: bool) -> EngineHarness:
    """Every kind in one batch beside base rows and compositions, prompts cut at many places."""
    folder = saved(architecture, folder)
    stock, adapters = draw_all(folder, torch.float32, list(KINDS))
    requests: dict[str, Uses] = {kind: [(kind, 1.0)] for kind in adapters}
    requests |= {"base": [], "half": [("dora", 0.5)], "both": [("dora", 0.7), ("norms", -0.4)], "last": []}
    harness = serve(folder, "float32", adapters, requests, CHUNKS, device=device, use_graphs=use_graphs)
    for name, uses in requests.items():
        want, got = wanted(stock, adapters, uses, harness, name), chosen(harness, name)
        columns = min(got.shape[1], want.shape[1])
        limit = 1e-5 * float(want.abs().max().clamp(min=1))
        torch.testing.assert_close(got[:, :columns], want[:, :columns], rtol=0, atol=limit, msg=name)
    for adapter in adapters.values():
        harness.engine.unload_adapter(adapter.version)
    harness.engine.check_integrity()
    return harness


@pytest.mark.parametrize("use_graphs", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
def test_every_kind_equals_the_base_s_own_code(architecture: str, use_graphs: bool, tmp_path: Path) -> None:
    harness = check(tmp_path, architecture, "cuda", use_graphs=use_graphs)
    assert harness.engine.adapters.pool.num_extra_bytes == 0


def test_steps_with_affine_vectors_alone_take_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    find = DecodeGraphs.find

    def finding(self: DecodeGraphs, num_rows: int, **kind: Any) -> Any:
        graph = find(self, num_rows, **kind)
        found.append(bool(kind.get("has_affine")) and graph is not None)
        return graph

    monkeypatch.setattr(DecodeGraphs, "find", finding)
    folder = saved("llama", tmp_path)
    stock, adapters = draw_all(folder, torch.float32, ["plain", "dora", "norms"])
    requests: dict[str, Uses] = {kind: [(kind, 1.0)] for kind in adapters}
    harness = serve(folder, "float32", adapters, requests, CHUNKS, device="cuda")
    assert isinstance(harness.engine.runner, DeviceRunner) and sum(found) > 3
    for name, uses in requests.items():
        want = wanted(stock, adapters, uses, harness, name)
        got = chosen(harness, name)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()), msg=name)
