"""The pattern keys answer as PEFT's regular expression does, on everything they accept, and in bounded time."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import AdapterRefused, RefusalCode
from adapters.name_patterns import MAX_LOOSE_PATTERNS, NamePattern, PatternTable

PIECES = ["a", "b", "1", ".", "\\.", "\\d", "\\w", "*", "+", "?", "|", "^", "$"]


@settings(max_examples=3000, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=7), st.text("ab.1", max_size=8))
def test_a_key_that_is_accepted_matches_what_peft_matches(pieces: list[str], name: str) -> None:
    key = "".join(pieces)
    try:
        pattern = NamePattern.parse(key, field="rank_pattern")
    except AdapterRefused:
        return
    assert pattern.matches(name) == bool(re.match(rf"(.*\.)?({key})$", name)), (key, name)


@pytest.mark.parametrize(
    ("key", "name", "is_match"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "model.layers.0.self_attn.xq_proj", False),
        ("layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", False),
        ("^model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("^layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", False),
        (r"layers\.\d+\.mlp\..*", "model.layers.17.mlp.gate_proj", True),
        (r".*self_attn.*", "model.layers.0.self_attn.q_proj", True),
        ("q_proj|v_proj", "model.layers.0.self_attn.v_proj", True),
        ("model.layers.0.q_proj$", "model.layers.0.q_proj", True),
    ],
)
def test_keys_of_real_files(key: str, name: str, is_match: bool) -> None:
    assert NamePattern.parse(key, field="rank_pattern").matches(name) == is_match


@pytest.mark.parametrize(
    "key", ["", "(a|b)", "[0-9]", "a{2}", "(?=a)", "a**", "*a", "([a-z_.0-9]+)+!", "a|", "\\", "é"]
)
def test_other_expressions_are_refused_by_name(key: str) -> None:
    with pytest.raises(AdapterRefused) as caught:
        NamePattern.parse(key, field="rank_pattern")
    assert caught.value.reason is RefusalCode.UNSUPPORTED
    assert "rank_pattern" in (caught.value.feature or "")


def test_the_first_key_that_matches_decides() -> None:
    table = PatternTable.parse({"mlp.up_proj": 1, "up_proj": 2, "layers.0.mlp.up_proj": 3}, field="rank_pattern")
    assert table.lookup("model.layers.0.mlp.up_proj", 9) == 1
    assert table.lookup("model.layers.0.up_proj", 9) == 2
    assert table.lookup("model.layers.0.down_proj", 9) == 9


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(AdapterRefused, match="over the limit of 4096"):
        PatternTable.parse({f"m{i}": 1 for i in range(4097)}, field="rank_pattern")
    with pytest.raises(AdapterRefused, match=f"over the limit of {MAX_LOOSE_PATTERNS}"):
        PatternTable.parse({f"m{i}.*": 1 for i in range(MAX_LOOSE_PATTERNS + 1)}, field="rank_pattern")


def test_nested_repeats_cost_no_more_than_length_times_length() -> None:
    pattern = NamePattern.parse("a*" * 100 + "b", field="rank_pattern")
    start = time.perf_counter()
    assert not pattern.matches("a" * 100 + ".xb")
    assert time.perf_counter() - start < 1.0  # `re` needs longer than the age of the universe
