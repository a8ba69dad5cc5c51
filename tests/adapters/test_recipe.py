"""Configs of every method that is served: each field has been looked at, and what is not served is refused by name."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import BdLoraConfig, LoraConfig, PeftType

from adapters.config_fields import FIELDS
from adapters.errors import AdapterRefused, RefusalCode
from adapters.recipe import METHODS, Recipe, read_recipe
from adapters.refusals import REFUSED_FIELDS, REFUSED_INITS, REFUSED_METHODS

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
CONFIGS = {
    "lora": peft.LoraConfig,
    "adalora": peft.AdaLoraConfig,
    "vera": peft.VeraConfig,
    "loha": peft.LoHaConfig,
    "delora": peft.DeloraConfig,
    "miss": peft.MissConfig,
    "ia3": peft.IA3Config,
    "ln_tuning": peft.LNTuningConfig,
}


def read(**fields: Any) -> Recipe:
    return read_recipe(json.dumps(PLAIN | fields).encode())


def refusal(**fields: Any) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        read(**fields)
    return caught.value


@pytest.mark.parametrize("method", CONFIGS)
def test_every_field_peft_knows_is_classed_once(method: str) -> None:
    """A field that a new PEFT brings must be looked at by a person before it is served or passed over."""
    known = FIELDS[method]
    fields = {field.name for field in dataclasses.fields(CONFIGS[method])}
    assert fields <= known.served | known.inert | known.refused.keys()
    assert not known.served & known.inert
    assert not (known.served | known.inert) & known.refused.keys()


def test_every_method_peft_knows_is_served_or_refused() -> None:
    known = {str(kind.value) for kind in PeftType}
    assert known <= METHODS.keys() | REFUSED_METHODS.keys()
    assert not METHODS.keys() & REFUSED_METHODS.keys()


PLAIN_FORM = b'{"alpha_pattern":[],"lora_alpha":8.0,"r":4,"rank_pattern":[],"use_rslora":false}'
PATTERNS_FORM = (
    b'{"alpha_pattern":[["q",1.5]],"lora_alpha":8.0,"r":4,"rank_pattern":[["b.q",3],["q",2]],"use_rslora":true}'
)


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({}, PLAIN_FORM),
        ({"use_dora": False, "lora_bias": False, "target_parameters": [], "modules_to_save": None}, PLAIN_FORM),
        ({"init_lora_weights": "gaussian", "target_modules": ["q"], "qalora_group_size": 16}, PLAIN_FORM),
        ({"use_rslora": True, "rank_pattern": {"b.q": 3, "q": 2}, "alpha_pattern": {"q": 1.5}}, PATTERNS_FORM),
    ],
)
def test_the_canonical_form_of_a_plain_adapter_is_as_it_was(fields: dict[str, Any], form: bytes) -> None:
    """Stored versions are named by it, and were before other methods than LoRA were read."""
    assert read(**fields).canonical() == read(**fields).scales.canonical() == form


CHANGES: list[dict[str, Any]] = [
    {"lora_alpha": 9},
    {"use_dora": True},
    {"lora_bias": True},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"trainable_token_indices": [1, 2]},
    {"trainable_token_indices": [2, 1]},
    {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    {"alora_invocation_tokens": [1, 2]},
    {"alora_invocation_tokens": [2, 1]},
    {"use_bdlora": {"target_modules_bd_a": ["o"], "nblocks": 2}},
    {"use_bdlora": {"target_modules_bd_b": ["o"], "nblocks": 2}},
    {"use_bdlora": {"target_modules_bd_b": ["o"], "nblocks": 4}},
    {"use_qalora": True},
    {"use_qalora": True, "qalora_group_size": 8},
    {"target_parameters": ["experts.down_proj"]},
    {"target_parameters": ["experts.down_proj"], "lora_B_layout": "rank_major"},
    {"target_parameters": ["experts.down_proj"], "peft_version": "0.18.0"},
    {"peft_type": "VERA", "lora_alpha": None},
    {"peft_type": "LOHA", "alpha": 1, "lora_alpha": None},
    {"peft_type": "LOHA", "alpha": 2, "lora_alpha": None},
    {"peft_type": "DELORA", "lora_alpha": None},
    {"peft_type": "MISS", "lora_alpha": None},
    {"peft_type": "MISS", "lora_alpha": None, "init_weights": "mini", "mini_r": 2},
]


def test_the_canonical_form_tells_meanings_apart() -> None:
    forms = [read(**change).canonical() for change in CHANGES]
    assert len({read().canonical(), *forms}) == len(CHANGES) + 1


def test_recipes_are_keys() -> None:
    """Plans of loading are found by them."""
    one, two = read(use_dora=True, alpha_pattern={"q": 1}), read(use_dora=True, alpha_pattern={"q": 1})
    assert one == two and hash(one) == hash(two) and one != read(use_dora=True)


def test_reads_what_peft_writes(tmp_path: Path) -> None:
    LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [4, 2]},
        use_bdlora=BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=2),
        bias="all",
        task_type="CAUSAL_LM",
        base_model_name_or_path="org/base",
    ).save_pretrained(str(tmp_path))
    recipe = read_recipe((tmp_path / "adapter_config.json").read_bytes())
    assert (recipe.method, recipe.bias, recipe.modules_to_save, recipe.use_dora) == ("lora", "all", ("lm_head",), False)
    assert recipe.token_ids == (("embed_tokens", (4, 2)),)
    assert recipe.bdlora is not None
    assert (recipe.bdlora.a, recipe.bdlora.b, recipe.bdlora.num_blocks) == (("o_proj",), (), 2)
    assert (recipe.peft_version, recipe.task_type) == (peft.__version__, "CAUSAL_LM")
    assert (recipe.scales.base_model, recipe.scales.target_modules) == ("org/base", ("q_proj",))


def test_what_is_said_of_fused_experts_is_kept() -> None:
    recipe = read(
        target_parameters=["experts.gate_up_proj"],
        auto_mapping={"unsloth_fixed": True, "parent_library": "adapters_must_not_import_this"},
        lora_B_layout="grouped_by_expert",
    )
    assert recipe.target_parameters == ("experts.gate_up_proj",)
    assert (recipe.unsloth_fixed, recipe.expert_b_layout) == (True, "grouped_by_expert")


@pytest.mark.parametrize("name", sorted(REFUSED_METHODS))
def test_methods_are_refused_by_name(name: str) -> None:
    refused = refusal(peft_type=name)
    assert (refused.reason, refused.feature) == (RefusalCode.UNSUPPORTED, f"peft_type={name}")
    assert refused.why and refused.fix


@pytest.mark.parametrize("name", sorted(REFUSED_FIELDS))
def test_fields_are_refused_by_name(name: str) -> None:
    refused = refusal(**{name: ["x"]})
    assert (refused.reason, refused.feature) == (RefusalCode.UNSUPPORTED, f"{name}=['x']")
    assert refused.why and refused.fix


@pytest.mark.parametrize("value", [*sorted(REFUSED_INITS), "pissa_niter_16", "invented_tomorrow", 3])
def test_starts_that_change_the_base_are_refused_by_name(value: object) -> None:
    refused = refusal(init_lora_weights=value)
    assert (refused.reason, refused.feature) == (RefusalCode.UNSUPPORTED, f"init_lora_weights={value}")
    assert ("loramux convert" in refused.fix) == (value in ("pissa", "olora"))


def test_kasa_says_how_to_convert_it() -> None:
    assert "loramux convert" in refusal(kasa_config={"beta": 1e-4}).fix


UNSUPPORTED, CORRUPT = RefusalCode.UNSUPPORTED, RefusalCode.CORRUPT
CELLS: list[tuple[dict[str, Any], RefusalCode, str]] = [
    ({"peft_type": None}, UNSUPPORTED, "peft_type"),
    ({"peft_type": "LORA2"}, UNSUPPORTED, "peft_type=LORA2"),
    ({"peft_type": ["LORA"]}, UNSUPPORTED, "peft_type=['LORA']"),
    ({"invented_tomorrow": 1}, RefusalCode.UNKNOWN_FIELD, "invented_tomorrow=1"),
    ({"peft_type": "IA3", "r": None, "lora_alpha": None, "twist": 1}, RefusalCode.UNKNOWN_FIELD, "twist=1"),
    ({"use_dora": True, "use_qalora": True}, UNSUPPORTED, "use_dora and use_qalora"),
    ({"use_dora": True, "lora_bias": True}, UNSUPPORTED, "use_dora and lora_bias"),
    ({"use_dora": True, "init_lora_weights": "mica"}, UNSUPPORTED, "use_dora and init_lora_weights=mica"),
    ({"use_bdlora": {"nblocks": 2}, "alora_invocation_tokens": [1]}, UNSUPPORTED,
     "use_bdlora and alora_invocation_tokens"),
    ({"velora_config": {"num_groups": 2}, "monteclora_config": {"num_samples": 2}}, UNSUPPORTED,
     "velora_config and monteclora_config"),
    ({"alora_invocation_string": "<go>"}, UNSUPPORTED, "alora_invocation_string=<go>"),
    ({"invocation_string": "<go>"}, UNSUPPORTED, "invocation_string=<go>"),
    ({"use_dora": 1}, CORRUPT, "use_dora"),
    ({"lora_bias": "yes"}, CORRUPT, "lora_bias"),
    ({"bias": "some"}, CORRUPT, "bias"),
    ({"bias": True}, CORRUPT, "bias"),
    ({"modules_to_save": [1]}, CORRUPT, "modules_to_save"),
    ({"modules_to_save": 3}, CORRUPT, "modules_to_save"),
    ({"target_parameters": {"a": 1}}, CORRUPT, "target_parameters"),
    ({"trainable_token_indices": 5}, CORRUPT, "trainable_token_indices"),
    ({"trainable_token_indices": [-1]}, CORRUPT, "trainable_token_indices"),
    ({"trainable_token_indices": [1.0]}, CORRUPT, "trainable_token_indices"),
    ({"trainable_token_indices": {"e": [1, 1]}}, CORRUPT, "trainable_token_indices['e']"),
    ({"trainable_token_indices": {"e": []}}, CORRUPT, "trainable_token_indices['e']"),
    ({"alora_invocation_tokens": "go"}, CORRUPT, "alora_invocation_tokens"),
    ({"alora_invocation_tokens": [True]}, CORRUPT, "alora_invocation_tokens"),
    ({"use_bdlora": True}, CORRUPT, "use_bdlora"),
    ({"use_bdlora": {"nblocks": 0}}, CORRUPT, "use_bdlora.nblocks"),
    ({"use_bdlora": {"nblocks": 2, "match_strict": "no"}}, CORRUPT, "use_bdlora.match_strict"),
    ({"use_bdlora": {"nblocks": 2, "twist": 1}}, RefusalCode.UNKNOWN_FIELD, "use_bdlora.twist=1"),
    ({"use_qalora": True, "qalora_group_size": 0}, CORRUPT, "qalora_group_size"),
    ({"modules_to_save": ["x"] * 1025}, CORRUPT, "modules_to_save"),
    ({"trainable_token_indices": {str(i): [i] for i in range(1025)}}, CORRUPT, "trainable_token_indices"),
    ({"peft_type": "IA3", "r": None, "lora_alpha": None, "feedforward_modules": ["x"] * 1025}, CORRUPT,
     "feedforward_modules"),
    ({"lora_B_layout": "diagonal"}, CORRUPT, "lora_B_layout"),
    ({"r": 0}, CORRUPT, "r"),
    ({"r": 4.0}, CORRUPT, "r"),
    ({"lora_alpha": None}, CORRUPT, "lora_alpha"),
    ({"peft_type": "LOHA", "lora_alpha": None}, CORRUPT, "alpha"),
    ({"peft_type": "MISS", "lora_alpha": None, "init_weights": "cat"}, CORRUPT, "init_weights"),
    ({"peft_type": "MISS", "lora_alpha": None, "init_weights": "mini"}, CORRUPT, "mini_r"),
    ({"peft_type": "ADALORA", "r": 8}, CORRUPT, "init_r"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "code", "feature"), CELLS, ids=[str(cell[0])[:60] for cell in CELLS])
def test_values_are_refused_by_the_name_of_their_field(fields: dict[str, Any], code: RefusalCode, feature: str) -> None:
    refused = refusal(**fields)
    assert (refused.reason, refused.feature) == (code, feature)


def test_a_config_of_a_megabyte_is_refused_unread() -> None:
    with pytest.raises(AdapterRefused) as caught:
        read_recipe(b" " * (1 << 20) + b"{}")
    assert caught.value.reason is RefusalCode.TOO_LARGE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({name for table in FIELDS.values() for name in table.served | table.inert | table.refused.keys()})


@settings(max_examples=800, deadline=None)
@given(
    st.sampled_from([*METHODS, None]),
    st.dictionaries(st.sampled_from([*NAMES, "unknown"]), JSON, max_size=4),
)
def test_no_config_raises_anything_but_a_refusal(peft_type: str | None, fields: dict[str, Any]) -> None:
    fields = {"r": 4, "lora_alpha": 8, "alpha": 8, "init_r": 4} | fields | {"peft_type": peft_type}
    if peft_type != "LOHA":
        del fields["alpha"]
    try:
        recipe = read_recipe(json.dumps(fields).encode())
        scale = recipe.scales.scale_of("model.layers.0.self_attn.q_proj") if recipe.method == "lora" else 1.0
    except AdapterRefused as refused:
        assert str(refused).isprintable()
        assert refused.feature
        return
    assert math.isfinite(scale)
    assert hash(recipe) == hash(recipe) and recipe.canonical().isascii()
