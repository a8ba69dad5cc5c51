"""The whole engine on a CUDA device against PEFT: kernels, staging, graphs and look-ahead together."""

from pathlib import Path

import pytest
import torch

from server.engine.device_runner import DeviceRunner
from tests.equivalence.architectures import VOCAB, save
from tests.equivalence.harness import EngineHarness, Squeeze
from tests.equivalence.test_mixed_batch import check_bfloat16, check_float32, make_adapters, prompts, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _open(base: Path, dtype: str, *, use_graphs: bool = True, look_ahead: bool = False) -> EngineHarness:
    squeeze = Squeeze(num_blocks=80)
    return EngineHarness.open(base, dtype, squeeze, device="cuda", use_graphs=use_graphs, look_ahead=look_ahead)


@pytest.mark.parametrize("use_graphs", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
def test_every_row_equals_peft_alone(architecture: str, dtype: str, use_graphs: bool, tmp_path: Path) -> None:
    base = save(architecture, tmp_path / architecture)
    adapters = make_adapters(base, tmp_path / "adapters")
    harness = _open(base, dtype, use_graphs=use_graphs)
    cases = prompts(VOCAB)
    serve(harness, cases, adapters)
    (check_float32 if dtype == "float32" else check_bfloat16)(harness, cases, base, adapters)


def test_all_graphs_are_captured_and_used(tmp_path: Path) -> None:
    base = save("llama", tmp_path / "llama")
    runner = _open(base, "float32").engine.runner
    assert isinstance(runner, DeviceRunner) and runner.graphs is not None
    assert runner.graphs.num_graphs == 3 * len(runner.graphs.sizes)


@pytest.mark.parametrize("use_graphs", [False, True])
def test_look_ahead_changes_no_token(use_graphs: bool, tmp_path: Path) -> None:
    base = save("llama", tmp_path / "llama")
    adapters = make_adapters(base, tmp_path / "adapters")
    found = []
    for look_ahead in (False, True):
        harness = _open(base, "float32", use_graphs=use_graphs, look_ahead=look_ahead)
        serve(harness, prompts(VOCAB), adapters)
        found.append({name: harness.tokens(name) for name in harness.requests})
    assert found[0] == found[1]


@pytest.mark.parametrize("sampling", [{"temperature": 0.9}, {"temperature": 1.2, "top_p": 0.9, "top_k": 40}])
def test_seeded_draws_are_the_same_with_look_ahead(sampling: dict[str, float], tmp_path: Path) -> None:
    base = save("qwen3", tmp_path / "qwen3")
    found = []
    for look_ahead in (False, True):
        harness = _open(base, "float32", look_ahead=look_ahead)
        for i in range(4):
            harness.add(str(i), range(3 + i, 20), seed=i, max_tokens=40, **sampling)
        harness.run()
        found.append([harness.tokens(str(i)) for i in range(4)])
    assert found[0] == found[1] and len(set(found[0][0])) > 5
