"""Scales of modules against PEFT's own files and rules."""

import json
import math
from pathlib import Path
from typing import Any

from peft import LoraConfig

from adapters.lora_config import CONFIG_NAME, LoRAConfig
from adapters.recipe import read_recipe

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def parse(**fields: Any) -> LoRAConfig:
    return read_recipe(json.dumps(PLAIN | fields).encode()).scales


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
    config = read_recipe((tmp_path / CONFIG_NAME).read_bytes()).scales
    assert (config.r, config.lora_alpha, config.base_model) == (4, 12.0, "org/base")
    assert config.target_modules == ("q_proj",)
    assert config.features == ("rslora", "rank_pattern", "alpha_pattern")
    assert config.scale_of("model.layers.0.self_attn.q_proj") == 12 / math.sqrt(6)
    assert config.scale_of("model.layers.1.self_attn.q_proj") == 32 / math.sqrt(4)


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
