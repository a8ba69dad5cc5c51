"""`loadtest extras`: it runs, each kind is really in its step, its limit tells slow from fast."""

import json
from pathlib import Path

import pytest

from adapters.ops.thread_team import current_team, start_team
from adapters.step_features import NO_FEATURES, StepFeature
from loadtest import __main__ as command_line
from loadtest.extras import ExtrasSettings
from loadtest.extras_run import CHECKED, MAX_RATIO, Steps, line
from tests.equivalence.architectures import save


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


def test_it_measures_every_kind_and_writes_it_down(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = current_team().num_threads
    page = tmp_path / "cpu-extras.md"
    numbers = [
        "--rows",
        "4",
        "--adapters",
        "2",
        "--lora-rank",
        "4",
        "--context",
        "20",
        "--rounds",
        "2",
        "--threads",
        "1",
    ]
    paths = ["--model", str(llama), "--results", str(tmp_path), "--publish", str(page)]
    assert command_line.main(["extras", "--no-check", *numbers, *paths]) == 0
    start_team(before)
    (written,) = tmp_path.glob("extras-*.json")
    found = json.loads(written.read_text())["kinds"]
    assert len(found) == 7 and all(each["ms"] > 0 and each["ratio"] > 0 for each in found)
    assert {each["one row has"] for each in found if each["limit"] == MAX_RATIO} == set(CHECKED)
    assert page.read_text() in capsys.readouterr().out


def test_one_row_of_each_step_has_what_it_says(llama: Path) -> None:
    steps, kinds = Steps.open(ExtrasSettings(model=llama, rows=4, adapters=2, lora_rank=4, context=20))
    assert steps.batch(None).extras is None
    features = dict.fromkeys(CHECKED, StepFeature.AFFINE) | {
        "LoRA on the embedding": StepFeature.EMBEDDING,
        "10 trained tokens": StepFeature.EMBEDDING | StepFeature.HEAD,
        "LoRA on the head": StepFeature.HEAD,
        "a head of its own": StepFeature.HEAD,
    }
    for kind, model in kinds.items():
        batch = steps.batch(model)
        assert batch.extras is not None and batch.extras.features == features.pop(kind) != NO_FEATURES
        assert batch.lora is not None and len(set(batch.lora.starts.tolist())) == 3
        rows = {row for part in (*batch.extras.tokens, *batch.extras.kept) for row in part.rows.tolist()}
        assert rows | set(batch.extras.affine_tokens.tolist()) == {2}
    assert features == {}


def test_a_kind_that_is_too_slow_is_told() -> None:
    fast, slow = [(1.0, 1.0), (1.0, 1.04), (2.0, 2.3)], [(1.0, 1.06), (2.0, 2.2), (1.0, 1.0)]
    assert line("DoRA", fast)["holds"] is True and line("DoRA", slow)["holds"] is False
    assert line("a head of its own", slow)["holds"] is None


@pytest.mark.parametrize("number", ["--rows", "--rounds", "--threads"])
def test_numbers_that_measure_nothing_are_refused(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["extras", number, "0"]) == 1
    assert f"{number} is 0" in capsys.readouterr().err
