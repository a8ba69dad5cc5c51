"""The config parser against PEFT's own files and rules, and against every field it must not pass over."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from adapters.errors import AdapterRefused, RefusalCode
from adapters.lora_config import CONFIG_NAME, INERT_FIELDS, SERVED_FIELDS, UNSERVED_FIELDS, LoRAConfig

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def parse(**fields: Any) -> LoRAConfig:
    return LoRAConfig.parse(json.dumps(PLAIN | fields).encode())


def refusal(**fields: Any) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        parse(**fields)
    return caught.value


def test_every_field_peft_knows_is_classed() -> None:
    """A field that a new PEFT brings must be looked at by a person before it is served or passed over."""
    known = SERVED_FIELDS | INERT_FIELDS | UNSERVED_FIELDS.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known
    assert not (SERVED_FIELDS & INERT_FIELDS or (SERVED_FIELDS | INERT_FIELDS) & UNSERVED_FIELDS.keys())


def test_reads_what_peft_writes(tmp_path: Path) -> None:
    LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=True,
        target_modules=["q_proj"],
        layers_to_transform=[0, 1],
        rank_pattern={"layers.0.self_attn.q_proj": 6},
        alpha_pattern={r"layers\.1\..*": 32},
        base_model_name_or_path="org/base",
        task_type="CAUSAL_LM",
    ).save_pretrained(str(tmp_path))
    config = LoRAConfig.parse((tmp_path / CONFIG_NAME).read_bytes())
    assert (config.r, config.lora_alpha, config.base_model) == (4, 12.0, "org/base")
    assert config.target_modules == ("q_proj",)
    assert config.features == ("rslora", "rank_pattern", "alpha_pattern")
    assert config.scale_of("model.layers.0.self_attn.q_proj") == 12 / math.sqrt(6)
    assert config.scale_of("model.layers.1.self_attn.q_proj") == 32 / math.sqrt(4)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "mica", "eva"])
def test_starts_that_leave_the_base_alone_are_served(init: object) -> None:
    assert parse(init_lora_weights=init).r == 4


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_fields_that_are_off_are_passed_over(value: object) -> None:
    fields = dict.fromkeys(UNSERVED_FIELDS, value) | {"invented_tomorrow": value}
    assert parse(**fields).r == 4


@pytest.mark.parametrize("name", sorted(UNSERVED_FIELDS))
def test_every_unserved_field_is_refused_by_name_with_a_way_out(name: str) -> None:
    refused = refusal(**{name: ["x"]})
    assert refused.reason is RefusalCode.UNSUPPORTED
    assert refused.feature == f"{name}=['x']"
    assert refused.why and refused.fix


def test_a_target_modules_expression_is_not_run() -> None:
    assert parse(target_modules="([a-z_.0-9]+)+!").target_modules == ()


def test_nothing_is_imported() -> None:
    mapping = {"base_model_class": "X", "parent_library": "adapters_must_not_import_this"}
    assert parse(auto_mapping=mapping, megatron_core="adapters_must_not_import_this_either").r == 4


def test_canonical_depends_on_the_mathematics_alone() -> None:
    one = parse(lora_alpha=8, task_type="CAUSAL_LM", lora_dropout=0.1, base_model_name_or_path="a")
    two = parse(lora_alpha=8.0, peft_version="0.21.2", inference_mode=True, base_model_name_or_path="b")
    assert one.canonical() == two.canonical()
    changed = [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"q": 1}}, {"rank_pattern": {"q": 1}}]
    assert len({one.canonical(), *(parse(**change).canonical() for change in changed)}) == 5


def test_canonical_keeps_the_order_of_patterns() -> None:
    """The first key that matches wins, so another order is another adapter."""
    first, second = {"a.q": 1, "q": 2}, {"q": 2, "a.q": 1}
    assert parse(alpha_pattern=first).canonical() != parse(alpha_pattern=second).canonical()


def test_a_declared_base_is_made_printable() -> None:
    assert parse(base_model_name_or_path="a\n\x1b[31m").base_model == "a\\n\\x1b[31m"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(SERVED_FIELDS | INERT_FIELDS | UNSERVED_FIELDS.keys() | {"unknown"})


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_no_config_raises_anything_but_a_refusal(fields: dict[str, Any]) -> None:
    try:
        config = LoRAConfig.parse(json.dumps(PLAIN | fields).encode())
        scale = config.scale_of("model.layers.0.self_attn.q_proj")
    except AdapterRefused as refused:
        assert str(refused).isprintable()
        return
    assert math.isfinite(scale)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_refusal(data: bytes) -> None:
    with pytest.raises(AdapterRefused):
        LoRAConfig.parse(data)
