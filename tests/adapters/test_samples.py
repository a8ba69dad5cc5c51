"""The sample adapters as shipped, and the data and scorers they were trained and measured with.

Nothing here trains or loads the base model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapters.samples
from adapters.samples.json_task import extract_object
from adapters.samples.pirate_task import PIRATE
from adapters.samples.registry import TASKS
from adapters.samples.sql_task import SQL, extract_query
from adapters.samples.task import Item

SAMPLES = Path(adapters.samples.__file__).parent
NAMES = sorted(TASKS)
MAX_BYTES = 3 * 1024 * 1024


@pytest.mark.parametrize("name", NAMES)
def test_folder_weighs_three_mebibytes_at_most(name: str) -> None:
    assert sum(file.stat().st_size for file in (SAMPLES / name).iterdir()) <= MAX_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_bfloat16_and_every_b_is_trained(name: str) -> None:
    weights = load_file(SAMPLES / name / "adapter_model.safetensors")
    of_b = [key for key in weights if key.endswith(".lora_B.weight")]
    assert 2 * len(of_b) == len(weights) > 0
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in weights.values())
    assert [key for key in of_b if not weights[key].any()] == []


@pytest.mark.parametrize("name", NAMES)
def test_config_names_the_public_base_model_and_matches_the_weights(name: str) -> None:
    config = json.loads((SAMPLES / name / "adapter_config.json").read_text(encoding="utf-8"))
    weights = load_file(SAMPLES / name / "adapter_model.safetensors")
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {w.shape[0] for key, w in weights.items() if ".lora_A." in key} == {config["r"]}
    assert {key.split(".")[-3] for key in weights} == set(config["target_modules"])


@pytest.mark.parametrize("name", NAMES)
def test_model_card_names_its_task_command_and_licence(name: str) -> None:
    card = (SAMPLES / name / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert f"python -m adapters.samples.train --task {name}" in card


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "held-out"])
def test_equal_seeds_draw_equal_items_and_others_do_not(name: str, split: str) -> None:
    task = TASKS[name]
    assert task.items(split, 40, seed=3) == task.items(split, 40, seed=3)  # type: ignore[arg-type]
    assert task.items(split, 40, seed=3) != task.items(split, 40, seed=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_held_out_prompts_are_distinct_and_never_trained_on(name: str) -> None:
    trained = {item.prompt for item in TASKS[name].items("train", 2000, seed=20)}
    held_out = [item.prompt for item in TASKS[name].items("held-out", 120, seed=20)]
    assert len(set(held_out)) == 120
    assert trained.isdisjoint(held_out)


def test_held_out_tables_are_never_trained_on() -> None:
    trained = {item.facts.partition("(")[0] for item in SQL.items("train", 1000, seed=20)}
    held_out = {item.facts.partition("(")[0] for item in SQL.items("held-out", 120, seed=20)}
    assert trained.isdisjoint(held_out)


def test_asking_for_more_held_out_items_than_exist_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"'pirate' has only \d+ different held-out items, 100000"):
        PIRATE.items("held-out", 100_000, seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_score_one_and_others_less(name: str) -> None:
    task = TASKS[name]
    for item in task.items("held-out", 60, seed=5):
        assert set(task.score(item, item.answer).values()) == {1.0}
        assert set(task.score(item, "I do not know.").values()) == {0.0}
        assert set(task.score(item, "").values()) == {0.0}


COUNTED = Item("", "SELECT COUNT(*) FROM ships WHERE port = 'Cork';", facts="ships(port, flag, crew)")
SORTED = Item("", "SELECT port FROM ships ORDER BY crew DESC LIMIT 3;", facts="ships(port, flag, crew)")


@pytest.mark.parametrize(
    ("item", "reply", "expected"),
    [
        (COUNTED, "Sure:\n```sql\nselect count(*) from ships where port='Cork'\n```\nIt counts.", 1.0),
        (COUNTED, "SELECT COUNT(port) FROM ships WHERE port = 'Cork' AND crew > 0", 1.0),
        (COUNTED, "SELECT COUNT(*) FROM ships;", 0.0),
        (COUNTED, "SELECT * FROM ships WHERE port = 'Cork';", 0.0),
        (COUNTED, "SELECT COUNT(*) FROM boats WHERE port = 'Cork';", 0.0),
        (COUNTED, "DROP TABLE ships;", 0.0),
        (SORTED, "SELECT port FROM ships ORDER BY crew LIMIT 3;", 0.0),
        (SORTED, "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r;", 0.0),
    ],
)
def test_sql_is_scored_by_what_it_returns(item: Item, reply: str, expected: float) -> None:
    assert SQL.score(item, reply) == {"execution accuracy": expected}


def test_first_query_is_taken_from_prose() -> None:
    assert extract_query("Use SELECT a FROM t; or SELECT b FROM t;") == "SELECT a FROM t;"


@pytest.mark.parametrize(
    ("reply", "field_f1"),
    [
        ('Here: {"age": 30, "name": "Ann"} Done.', 1.0),
        ('{"name": "Ann"}', 2 / 3),
        ('{"name": "Ann", "age": "30"}', 0.5),
        ('{"name": "Ann", "age": 30, "city": "Rome"}', 0.8),
        ('{"name": "Ann", "age": 30', 0.0),
        ("[1, 2]", 0.0),
    ],
)
def test_json_is_scored_by_exact_fields(reply: str, field_f1: float) -> None:
    scores = TASKS["json"].score(Item("", '{"name": "Ann", "age": 30}'), reply)
    assert scores["field F1"] == pytest.approx(field_f1)
    assert scores["all fields right"] == float(field_f1 == 1.0)


def test_object_is_found_behind_a_stray_brace() -> None:
    assert extract_object('set {x}: {"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("reply", "in_style", "right"),
    [
        ("Arr, th' capital o' Peru be Lima, matey!", 1.0, 1.0),
        ("Ahoy, matey! It be Cusco!", 1.0, 0.0),
        ("The capital of Peru is Lima.", 0.0, 1.0),
        ("Aye, the capital of Peru is Lima.", 0.0, 1.0),
        ("The capital of Peru is Limassol.", 0.0, 0.0),
    ],
)
def test_pirate_needs_both_the_style_and_the_fact(reply: str, in_style: float, right: float) -> None:
    scores = PIRATE.score(Item("What is the capital of Peru?", "", facts="Lima"), reply)
    assert scores == {"in style and right": in_style * right, "in style": in_style, "right": right}
