"""Names and shapes of LoRA files that are refused, each by the tensor's name and with the documented code."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter_folder import AdapterFolder
from adapters.errors import AdapterRefused, RefusalCode
from adapters.importers.registry import PROPOSE
from adapters.key_roles import read_keys
from adapters.propose import propose
from adapters.recipe import METHODS, Recipe, read_recipe
from adapters.safetensors_header import TensorEntry

Shapes = dict[str, tuple[int, ...]]
PAIR: Shapes = {"m.q_proj.lora_A.weight": (2, 16), "m.q_proj.lora_B.weight": (8, 2)}
OTHER: Shapes = {"m.o_proj.lora_A.weight": (2, 16), "m.o_proj.lora_B.weight": (8, 2)}
EMBEDDING: Shapes = {"e.lora_embedding_A": (2, 40), "e.lora_embedding_B": (16, 2)}
Q_BIAS = "m.q_proj.lora_B.bias"
Q_MAGNITUDE, O_MAGNITUDE = "m.q_proj.lora_magnitude_vector", "m.o_proj.lora_magnitude_vector"
BD = {"use_bdlora": {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}}


def recipe(**fields: Any) -> Recipe:
    return read_recipe(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields).encode())


def entries(shapes: Shapes) -> dict[str, TensorEntry]:
    return {name: TensorEntry(name, "F32", shape, 0, 0) for name, shape in shapes.items()}


def without(shapes: Shapes, key: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name != key}


A, B = PAIR
UNSUPPORTED, UNMATCHED, SHAPE = RefusalCode.UNSUPPORTED, RefusalCode.KEY_UNMATCHED, RefusalCode.SHAPE_MISMATCH
INCOMPLETE, AMBIGUOUS, CORRUPT = RefusalCode.INCOMPLETE_PAIR, RefusalCode.AMBIGUOUS_LAYOUT, RefusalCode.CORRUPT
CELLS: dict[str, tuple[dict[str, Any], Shapes, RefusalCode, str]] = {
    # name → fields, shapes, code, what the refusal names
    "A alone": ({}, without(PAIR, B), INCOMPLETE, A),
    "B alone": ({}, without(PAIR, A), INCOMPLETE, B),
    "magnitude alone": ({"use_dora": True}, {Q_MAGNITUDE: (8,)}, INCOMPLETE, Q_MAGNITUDE),
    "bias of B alone": ({"lora_bias": True}, {"m.q.lora_B.bias": (8,)}, INCOMPLETE, "m.q.lora_B.bias"),
    "embedding's A alone": ({}, PAIR | without(EMBEDDING, "e.lora_embedding_B"), INCOMPLETE, "e.lora_embedding_A"),
    "linear and embedding": ({}, PAIR | {"m.q_proj.lora_embedding_A": (2, 40)}, UNMATCHED, A),
    "dora: one magnitude lacks": ({"use_dora": True}, PAIR | OTHER | {Q_MAGNITUDE: (8,)}, INCOMPLETE, "use_dora"),
    "dora: all lack": ({"use_dora": True}, PAIR, INCOMPLETE, "use_dora"),
    "dora: an embedding's lacks": ({"use_dora": True}, PAIR | EMBEDDING | {Q_MAGNITUDE: (8,)}, INCOMPLETE, "use_dora"),
    "dora: other width": ({"use_dora": True}, PAIR | {Q_MAGNITUDE: (9,)}, SHAPE, Q_MAGNITUDE),
    "dora: a matrix": ({"use_dora": True}, PAIR | {Q_MAGNITUDE: (1, 8)}, SHAPE, Q_MAGNITUDE),
    "dora: denied": ({"use_dora": False}, PAIR | {Q_MAGNITUDE: (8,)}, AMBIGUOUS, "use_dora=False"),
    "dora: torchtune's queries, by PEFT": (
        {"peft_version": "0.17.0"}, PAIR | {Q_MAGNITUDE: (8,)}, AMBIGUOUS, "torchtune_magnitude",
    ),
    "dora: not said, one lacks": ({}, PAIR | OTHER | {O_MAGNITUDE: (8,)}, INCOMPLETE, "use_dora"),
    "dora: not said, with biases": (
        {"lora_bias": True}, OTHER | {O_MAGNITUDE: (8,), "m.o_proj.lora_B.bias": (8,)}, UNSUPPORTED,
        "use_dora and lora_bias",
    ),
    "bias of B denied": ({}, PAIR | {"m.q_proj.lora_B.bias": (8,)}, AMBIGUOUS, "m.q_proj.lora_B.bias"),
    "bias of B lacks": ({"lora_bias": True}, PAIR, INCOMPLETE, "lora_bias"),
    "bias of B, other width": ({"lora_bias": True}, PAIR | {Q_BIAS: (2,)}, SHAPE, Q_BIAS),
    "bias of B on an embedding": ({"lora_bias": True}, EMBEDDING, UNSUPPORTED, "e.lora_embedding_B"),
    "three dimensions": ({}, PAIR | {A: (2, 16, 3)}, UNSUPPORTED, A),
    "one dimension": ({}, PAIR | {B: (16,)}, UNSUPPORTED, B),
    "no numbers": ({}, PAIR | {A: (0,)}, CORRUPT, A),
    "embedding's ranks differ": ({}, EMBEDDING | {"e.lora_embedding_B": (16, 3)}, SHAPE, "e.lora_embedding_B"),
    "blocks: B not in blocks": (BD, PAIR, SHAPE, "use_bdlora"),
    "blocks: of no list": (BD, {"m.v.lora_A.weight": (2, 16), "m.v.lora_B.weight": (8, 2)}, SHAPE, "use_bdlora"),
    "blocks: of both lists": (
        {"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["proj"], "nblocks": 2}}, PAIR, SHAPE,
        "use_bdlora",
    ),
    "blocks: do not divide": (
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 3}}, PAIR, SHAPE, A,
    ),
    "qalora: ranks differ": ({"use_qalora": True, "qalora_group_size": 4}, PAIR | {B: (8, 3)}, SHAPE, B),
    "a scale past all": ({"lora_alpha": 5000}, PAIR, UNSUPPORTED, "lora_alpha=5000"),
    "an embedding's scale": ({"alpha_pattern": {"e": 5000}}, PAIR | EMBEDDING, UNSUPPORTED, "lora_alpha=5000"),
    "experts by config": ({"target_parameters": ["experts.down_proj"]}, PAIR, AMBIGUOUS, "target_parameters"),
    "velora not said": ({}, PAIR | {"m.q_proj.lora_velora_embed": (8,)}, UNMATCHED, "m.q_proj.lora_velora_embed"),
    "monteclora not said": (
        {}, PAIR | {"m.q_proj.lora_monteclora_sampler.std_prior": (2,)}, UNMATCHED,
        "m.q_proj.lora_monteclora_sampler.std_prior",
    ),
    "monteclora, unknown part": (
        {"monteclora_config": {"num_samples": 2}}, PAIR | {"m.q_proj.lora_monteclora_sampler.other": (2,)}, UNMATCHED,
        "m.q_proj.lora_monteclora_sampler.other",
    ),
    "velora alone": ({"velora_config": {"x": 1}}, {"m.q.lora_velora_embed": (8,)}, UNMATCHED, "m.q.lora_velora_embed"),
    "kasa not said": ({}, PAIR | {"m.q_proj.lora_diag": (2,)}, UNSUPPORTED, "kasa_config"),
    "adalora's": ({}, PAIR | {"m.q_proj.lora_E": (2, 1)}, UNMATCHED, "m.q_proj.lora_E"),
    "loralib's": ({}, {"m.q.lora_A": (2, 16), "m.q.lora_B": (8, 2)}, UNSUPPORTED, "format=loralib"),
    "mlx's or torchtune's": ({}, PAIR | {"m.q.lora_a.weight": (2, 16)}, UNSUPPORTED, "format=mlx or torchtune"),
    "kohya's": ({}, PAIR | {"lora_unet_down.lora_down.weight": (2, 16)}, UNSUPPORTED, "format=kohya"),
    "diffusers'": ({}, {"unet.q.x": (2, 2)}, UNSUPPORTED, "format=diffusers"),
    "another method's": ({}, PAIR | {"m.q_proj.miss_block": (2, 8)}, UNMATCHED, "m.q_proj.miss_block"),
    "vera's shared": ({}, PAIR | {"base_model.vera_A": (2, 8)}, UNMATCHED, "base_model.vera_A"),
    "a leftover": ({}, PAIR | {"m.q.lora_A.extra.more.weight": (2, 8)}, UNMATCHED, "m.q.lora_A.extra.more.weight"),
    "a scalar of nothing": ({}, PAIR | {"m.q_proj.alpha": ()}, UNMATCHED, "m.q_proj.alpha"),
    "no module": ({}, {"lora_A.weight": (2, 8), "lora_B.weight": (2, 8)}, UNMATCHED, "lora_A.weight"),
    "tokens of nothing": ({}, PAIR | {"e.trainable_tokens_delta": (2, 8)}, UNMATCHED, "e.trainable_tokens_delta"),
    "two adapters": (
        {}, PAIR | {"m.o.lora_A.x.weight": (2, 16), "m.o.lora_B.x.weight": (8, 2)}, AMBIGUOUS, "m.o.lora_A.x.weight",
    ),
    "two adapters, one magnitude's": (
        {"use_dora": True}, PAIR | {f"{Q_MAGNITUDE}.default": (8,)}, AMBIGUOUS, f"{Q_MAGNITUDE}.default",
    ),
    "two spellings": (
        {}, PAIR | {"m._orig_mod.q_proj.lora_A.weight": (2, 16)}, AMBIGUOUS, "m.q_proj.lora_A.weight",
    ),
    "a wrapper on some": ({}, PAIR | {"base_model.model.n.": (2, 16)}, UNMATCHED, "base_model.model.n."),
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_refused_by_name(name: str) -> None:
    fields, shapes, code, named = CELLS[name]
    with pytest.raises(AdapterRefused) as caught:
        propose(recipe(**fields), entries(shapes))
    refused = caught.value
    assert refused.reason is code
    assert named in (refused.tensor, refused.feature) or str(refused.feature).startswith(f"{named}=")
    assert refused.fix and str(refused).isprintable() and len(str(refused)) < 1200


def test_pairs_of_several_parameters_of_a_module_are_refused_as_experts() -> None:
    keys = [f"m.experts.base_layer.lora_{half}.weight" for half in "AB"]
    with pytest.raises(AdapterRefused) as caught:
        propose(recipe(), entries({keys[0]: (2, 16), keys[1]: (8, 2)}))
    assert (caught.value.feature, caught.value.tensor) == ("target_parameters", keys[0])


PARTS = st.sampled_from(
    """
    m q_proj default weight bias base_layer original_module token_adapter module _orig_mod lora_A lora_B lora_E lora_a m
    lora_embedding_A lora_magnitude_vector trainable_tokens_delta modules_to_save vera_A lora_monteclora_sampler ia3_l
    lora_velora_embed miss_block hada_w1_a hada_t1 delora_lambda ln_tuning_layers std_prior lora_diag base_model model
    """.split()
)
KEYS = st.lists(st.lists(PARTS, min_size=1, max_size=5).map(".".join), min_size=1, max_size=6, unique=True)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(sorted(METHODS)), KEYS, st.data())
def test_no_names_or_shapes_raise_anything_but_a_refusal(peft_type: str, keys: list[str], data: st.DataObject) -> None:
    numbers = {"LORA": {"lora_alpha": 4}, "ADALORA": {"lora_alpha": 4, "init_r": 2}, "LOHA": {"alpha": 2}}
    r = {} if peft_type in ("IA3", "LN_TUNING") else {"r": 2}
    found = read_recipe(json.dumps({"peft_type": peft_type} | r | numbers.get(peft_type, {})).encode())
    shapes = {key: data.draw(SHAPES) for key in keys}
    try:
        proposal = PROPOSE[found.method](found, entries(shapes))
    except AdapterRefused as refused:
        assert refused.tensor or refused.feature
        return
    assert len(proposal.dropped) <= len(keys)


@settings(max_examples=300, deadline=None)
@given(KEYS)
def test_reading_names_loses_none(keys: list[str]) -> None:
    try:
        read = read_keys(keys)
    except AdapterRefused as refused:
        assert refused.tensor in keys
        return
    assert sorted(key.key for key in read) == sorted(keys)


@pytest.mark.parametrize("names", [["adapters.safetensors"], ["adapters.safetensors", "0000100_adapters.safetensors"]])
def test_a_folder_of_mlx_is_found(names: list[str], tmp_path: Path) -> None:
    for name in ["adapter_config.json", *names]:
        (tmp_path / name).write_bytes(b"{}")
    with AdapterFolder.find(tmp_path) as folder:
        assert (folder.weights, folder.is_sharded) == ("adapters.safetensors", False)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.safetensors.index.json"])
def test_pefts_files_are_taken_before_mlx_ones(name: str, tmp_path: Path) -> None:
    for each in ("adapter_config.json", "adapters.safetensors", name):
        (tmp_path / each).write_bytes(b"{}")
    with AdapterFolder.find(tmp_path) as folder:
        assert folder.weights == name
