"""Decode steps played from a recording give the bits of steps that run the model's own code, whatever came between."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.ops import bf16_dot
from server.engine.model_runner import ModelRunner
from server.engine.recorded_runner import RecordedRunner
from tests.equivalence import oracle
from tests.equivalence.architectures import save
from tests.equivalence.harness import EngineHarness, Squeeze

pytestmark = pytest.mark.skipif(not bf16_dot.is_supported(), reason="steps are recorded where our products are")

PROMPTS = {f"r{i}": tuple(range(3 + i, 9 + 3 * i)) for i in range(5)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("adapters")
    targets = (["q_proj", "v_proj"], ["down_proj"], "all-linear")
    return [
        oracle.make_adapter(base, out / str(i), seed=i, std=0.2, r=4, target_modules=target)
        for i, target in enumerate(targets)
    ]


def serve(base: Path, adapters: list[Path], *, use_graphs: bool, look_ahead: bool = False) -> EngineHarness:
    """Requests that come and go, so that the number of rows rises and falls; adapters loaded one after the other."""
    harness = EngineHarness.open(base, "bfloat16", Squeeze(), use_graphs=use_graphs, look_ahead=look_ahead)
    first = harness.load(adapters[0])
    harness.add("r0", PROMPTS["r0"], max_tokens=40)
    harness.add("r1", PROMPTS["r1"], first, max_tokens=25)
    for _ in range(12):
        harness.engine_step()
    second, third = harness.load(adapters[1]), harness.load(adapters[2])
    harness.add("r2", PROMPTS["r2"], second, max_tokens=20)
    for _ in range(6):
        harness.engine_step()
    harness.add("r3", PROMPTS["r3"], third, max_tokens=12)
    harness.add("r4", PROMPTS["r4"], harness.use(first, 0.5), harness.use(third, 0.7), max_tokens=16)
    harness.run()
    return harness


def test_every_logit_has_the_bits_of_the_model_s_own_code(base: Path, adapters: list[Path]) -> None:
    recorded, eager = (serve(base, adapters, use_graphs=use) for use in (True, False))
    assert isinstance(recorded.engine.runner, RecordedRunner) and isinstance(eager.engine.runner, ModelRunner)
    assert recorded.engine.runner.num_recordings >= 5
    for name in PROMPTS:
        assert recorded.tokens(name) == eager.tokens(name)
        assert torch.equal(recorded.chosen_logits(name), eager.chosen_logits(name))
    base_only = EngineHarness.open(base, "bfloat16", Squeeze())
    base_only.add("r3", PROMPTS["r3"], max_tokens=12)
    base_only.run()
    assert recorded.tokens("r3") != base_only.tokens("r3"), "the adapter changes nothing, so nothing was proven"


def test_look_ahead_takes_tokens_over_into_a_recording(base: Path, adapters: list[Path]) -> None:
    ahead, eager = (serve(base, adapters, use_graphs=use, look_ahead=use) for use in (True, False))
    runner = ahead.engine.runner
    assert isinstance(runner, RecordedRunner) and runner.num_recordings >= 4
    for name in PROMPTS:
        assert ahead.tokens(name) == eager.tokens(name)


def test_a_kind_of_step_is_recorded_when_it_comes_again(base: Path) -> None:
    harness = EngineHarness.open(base, "bfloat16", Squeeze())
    runner = harness.engine.runner
    assert isinstance(runner, RecordedRunner)
    harness.add("one", PROMPTS["r0"], max_tokens=5)
    counts = []
    while harness.engine.has_work:
        harness.engine_step()
        counts.append(runner.num_recordings)
    assert counts == [0, 0, 1, 1, 1], "a prompt, a first step by the model's code, and recordings of one row"


def test_a_recording_that_fails_leaves_the_steps_to_the_model(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    harness, other = (EngineHarness.open(base, "bfloat16", Squeeze()) for _ in range(2))

    def refuse(*_: object) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr("server.engine.recorded_runner.record", refuse)
    harness.add("one", PROMPTS["r0"], max_tokens=8)
    harness.run()
    assert caplog.text.count("not recorded and run slower: MemoryError: planted") == 1
    monkeypatch.undo()
    other.add("one", PROMPTS["r0"], max_tokens=8)
    other.run()
    assert harness.tokens("one") == other.tokens("one")
    assert harness.engine.runner.num_recordings == 0  # type: ignore[attr-defined]


def test_a_recording_that_fails_when_played_leaves_its_steps_to_the_model(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    harness, other = (EngineHarness.open(base, "bfloat16", Squeeze()) for _ in range(2))

    def refuse(_: object) -> None:
        raise RuntimeError("planted")

    other.add("one", PROMPTS["r0"], max_tokens=8)
    other.run()
    monkeypatch.setattr("server.engine.recording.Recording.play", refuse)
    harness.add("one", PROMPTS["r0"], max_tokens=8)
    harness.run()
    assert caplog.text.count("RuntimeError: planted") == 1 and harness.tokens("one") == other.tokens("one")


def test_a_cache_of_one_block_is_not_written_past(base: Path) -> None:
    harness = EngineHarness.open(base, "bfloat16", Squeeze(num_blocks=1, block_size=16, max_num_seqs=1))
    harness.add("one", PROMPTS["r0"], max_tokens=4)
    harness.run()
    assert len(harness.tokens("one")) == 4 and not isinstance(harness.engine.runner, RecordedRunner)


def _counts_its_calls(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer that does something else every time, by a number that no operation shows."""
    calls = 0

    def planted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(x) * calls

    return planted


def _asks_for_a_value(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def planted(x: Tensor) -> Tensor:
        return forward(x) if float(x.abs().max()) < 1e9 else x

    return planted


@pytest.mark.parametrize(
    ("plant", "message"),
    [(_counts_its_calls, "gave other logits"), (_asks_for_a_value, "asks a tensor for its value")],
)
def test_a_model_that_cannot_be_played_back_is_not_recorded(
    base: Path, plant: Callable[..., Callable[..., Tensor]], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    harness = EngineHarness.open(base, "bfloat16", Squeeze())
    engine = harness.engine
    norm = engine.base.model.model.norm
    object.__setattr__(norm, "forward", plant(norm.forward))
    runner = RecordedRunner(engine.base, engine.runner.lora)  # type: ignore[attr-defined]
    runner.try_out()
    assert runner.is_recording is False and message in caplog.text
