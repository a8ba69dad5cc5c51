"""What whoever loads an adapter says of its files: tensors to leave out, and how fused experts are stored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.base_walk import modules_of
from adapters.checkpoint import LoadedAdapter, load_lora_model
from adapters.errors import AdapterOptionInvalid, AdapterRefused, RefusalCode
from adapters.lora_config import CONFIG_NAME
from adapters.plan_cache import PlanCache
from adapters.read_options import MAX_PATTERN_CHARS, MAX_PATTERNS, ReadOptions, ignored_among
from adapters.shard_index import MAX_SHARDS
from tests.adapters.hostile import WEIGHTS, draft, healthy, write_config
from tests.adapters.test_experts import MODELS, E, H, M
from tests.adapters.test_load_experts import R, saved, stacked, trained
from tests.adapters.test_load_experts import load as load_on
from tests.adapters.test_plan_cache import BASE, LIMITS
from tests.conformance.models import fresh

EXTRA = "base_model.model.model.rotary_emb.inv_freq"
TOWER = "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight"


def load(folder: Path, *ignore: str, plans: PlanCache | None = None) -> LoadedAdapter:
    options = ReadOptions(ignore=ignore)
    return load_lora_model(folder, BASE, limits=LIMITS, dtype=torch.float32, plans=plans, options=options)


def with_more(folder: Path, *, value: float = 1.0) -> Path:
    """An adapter whose file also holds a buffer and half a pair of a tower."""
    drawn = draft(folder, BASE, num_modules=6)
    drawn.tensors[EXTRA] = np.full(6, value, dtype=np.float32)
    drawn.tensors[TOWER] = np.full((4, 3), value, dtype=np.float32)
    drawn.write()
    return folder


def refusal(folder: Path, *ignore: str, plans: PlanCache | None = None) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        load(folder, *ignore, plans=plans)
    return caught.value


def test_what_is_ignored_is_not_there_and_is_told(tmp_path: Path) -> None:
    plain = load(healthy(tmp_path / "plain", BASE)).model
    folder = with_more(tmp_path / "more")
    assert refusal(folder).reason is RefusalCode.KEY_UNMATCHED, "it is no test of ignoring"
    loaded = load(folder, "*.inv_freq", "*.visual.*")
    assert loaded.report.ignored == {EXTRA: 24, TOWER: 48}
    assert loaded.report.to_dict()["ignored"] == {EXTRA: 24, TOWER: 48}
    whole = load(draft_of(tmp_path / "whole"))
    assert whole.report.ignored == {}
    for name, weights in whole.model.modules.items():
        assert torch.equal(loaded.model.modules[name].lora_a, weights.lora_a)
        assert torch.equal(loaded.model.modules[name].lora_b, weights.lora_b)
    assert len(loaded.model.modules) == 6 and loaded.model.num_bytes == whole.model.num_bytes
    assert len({plain.version, whole.model.version, loaded.model.version}) == 3


def draft_of(folder: Path) -> Path:
    draft(folder, BASE, num_modules=6).write()
    return folder


def test_the_version_hangs_on_what_is_left_out_not_on_how_that_was_said(tmp_path: Path) -> None:
    folder = with_more(tmp_path / "more")
    one = load(folder, "*.inv_freq", "*.visual.*").model.version
    assert load(folder, TOWER, EXTRA, "*inv?freq").model.version == one
    first = "base_model.model.model.layers.0.q."
    less = load(folder, "*.inv_freq", "*.visual.*", f"{first}*").model
    assert less.version != one and len(less.modules) == 5
    drawn = draft(tmp_path / "renamed", BASE, num_modules=6)
    drawn.tensors[EXTRA + "s"] = np.ones(6, dtype=np.float32)
    drawn.tensors[TOWER] = np.ones((4, 3), dtype=np.float32)
    drawn.write()
    assert load(tmp_path / "renamed", "*.inv_freqs", "*.visual.*").model.version != one


def test_bytes_of_ignored_tensors_are_not_looked_at(tmp_path: Path) -> None:
    ones = load(with_more(tmp_path / "ones"), "*.inv_freq", "*.visual.*").model
    nans = load(with_more(tmp_path / "nans", value=float("nan")), "*.inv_freq", "*.visual.*").model
    assert ones.version == nans.version


@pytest.mark.parametrize("half", ["A", "B"])
def test_half_a_pair_is_refused_as_ever(tmp_path: Path, half: str) -> None:
    folder = draft_of(tmp_path)
    refused = refusal(folder, f"*.layers.1.v.lora_{half}.weight")
    assert refused.reason is RefusalCode.INCOMPLETE_PAIR
    assert refused.tensor is not None and "layers.1.v" in refused.tensor


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    folder = with_more(tmp_path)
    for pattern in ("*.inv_frequency", "inv_freq", "*.inv_freq ", EXTRA.upper(), "[!b]*", "*.inv_freq\\"):
        refused = refusal(folder, "*.visual.*", "*.inv_freq", pattern)
        assert refused.reason is RefusalCode.KEY_UNMATCHED
        assert refused.feature is not None and refused.feature.startswith("ignore=")
        assert pattern.strip().rstrip("\\") in refused.feature


@pytest.mark.parametrize("patterns", [("*",), ("base_model.*",), ("*.lora_?.weight", "*.inv_freq")])
def test_everything_cannot_be_ignored(tmp_path: Path, patterns: tuple[str, ...]) -> None:
    refused = refusal(with_more(tmp_path), *patterns)
    assert refused.reason is RefusalCode.KEY_UNMATCHED and "nothing would be left" in refused.why


def test_a_plan_is_not_taken_for_other_options(tmp_path: Path) -> None:
    folder, plans = with_more(tmp_path), PlanCache()
    less = load(folder, "*.inv_freq", "*.visual.*", plans=plans)
    assert refusal(folder, plans=plans).reason is RefusalCode.KEY_UNMATCHED
    fewer = load(folder, "*.inv_freq", "*.visual.*", "*.layers.0.*", plans=plans)
    assert (len(less.model.modules), len(fewer.model.modules)) == (6, 4)
    again = load(folder, "*.visual.*", "*.inv_freq", plans=plans)
    assert len(plans) == 2 and again.model.version == less.model.version and again.report == less.report


def test_tensors_of_shards_are_ignored(tmp_path: Path) -> None:
    assert MAX_SHARDS >= 2
    tensors = load_file(with_more(tmp_path) / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    names, index = sorted(tensors), {}
    for number, some in enumerate((names[:5], names[5:])):
        shard = f"adapter_model-{number}.safetensors"
        save_file({name: tensors[name] for name in some}, tmp_path / shard)
        index |= dict.fromkeys(some, shard)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    assert load(tmp_path, "*.inv_freq", "*.visual.*").report.ignored == {EXTRA: 24, TOWER: 48}


def test_a_tower_can_be_left_out(tmp_path: Path) -> None:
    """What PEFT's all-linear trains of a vision-language model's text is served to PEFT's numbers."""
    model = get_peft_model(fresh("qwen2_vl"), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(str(tmp_path))
    base = modules_of(fresh("qwen2_vl"))
    with pytest.raises(AdapterRefused) as caught:
        load_lora_model(tmp_path, base, limits=LIMITS, dtype=torch.float32)
    assert "tower" in caught.value.why and "`ignore`" in caught.value.fix
    options = ReadOptions(ignore=("*.visual.*",))
    loaded = load_lora_model(tmp_path, base, limits=LIMITS, dtype=torch.float32, options=options)
    assert len(loaded.model.modules) == len(base.linears) and all(".visual." in name for name in loaded.report.ignored)
    for module, weights in loaded.model.modules.items():
        theirs = model.base_model.model.get_submodule(module).get_delta_weight("default").detach()
        assert (weights.lora_b.T @ weights.lora_a - theirs).abs().max() <= 1e-6 * theirs.abs().max()


# Patterns.


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.*", "a.b a.c a.b.c a."),
        ("a.?", "a.b a.c"),
        ("a.[bc]", "a.b a.c"),
        ("a.[!c]", "a.b"),
        ("*.b*", "a.b a.b.c"),
        ("[a]*[c]", "a.c a.b.c"),
        ("a.b", "a.b"),
    ],
)
def test_a_pattern_is_of_the_whole_name(pattern: str, names: str) -> None:
    sizes = dict.fromkeys(["a.b", "a.c", "a.b.c", "a.", "A.b", "xa.b.", "a"], 1)
    if pattern == "*.b*":
        names += " A.b xa.b."
    assert set(ignored_among(sizes, [pattern])) == set(names.split())


def test_a_pattern_of_many_stars_is_quick() -> None:
    name = "a" * 255 + "b"
    with pytest.raises(AdapterRefused):
        ignored_among({name: 1, "c": 1}, ["*a" * 127 + "*c"])


@given(st.text(min_size=1, max_size=12, alphabet="a.[]!^-*?\\&~|z0"), st.text(max_size=8, alphabet="a.[]^z0-"))
def test_any_pattern_is_tried_or_refused(pattern: str, name: str) -> None:
    try:
        ignored = ignored_among({name: 1, "never \n matched \0": 2}, [pattern])
    except AdapterRefused as refused:
        assert refused.reason is RefusalCode.KEY_UNMATCHED
    else:
        assert ignored


def test_options_have_bounds_and_one_order() -> None:
    assert ReadOptions(ignore=("b", "a", "b")).ignore == ("a", "b")
    assert ReadOptions(ignore=tuple(map(str, range(MAX_PATTERNS))))
    assert not ReadOptions()
    cases: list[dict[str, Any]] = [
        {"ignore": tuple(map(str, range(MAX_PATTERNS + 1)))},
        {"ignore": ("",)},
        {"ignore": ("a" * (MAX_PATTERN_CHARS + 1),)},
        {"ignore": ("a\nb",)},
        {"ignore": ("a\0",)},
        {"moe_lora_b_layout": "rank"},
        {"moe_lora_b_layout": ""},
    ]
    for case in cases:
        with pytest.raises(AdapterOptionInvalid) as caught:
            ReadOptions(**case)
        assert next(iter(case)) in str(caught.value) and caught.value.status == 400


# Experts.


def unmarked(name: str, folder: Path, *, grouped: bool) -> Any:
    """What PEFT trained, as Unsloth saved it before or after it changed; the config says neither. Returns the model."""
    model = trained(name, folder, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["auto_mapping"] = {"unsloth_fixed": True}
    write_config(folder, config)
    if grouped:
        tensors = load_file(folder / WEIGHTS)
        for tensor in (each for each in tensors if ".lora_B." in each):
            by_rank = tensors[tensor].view(len(tensors[tensor]), R, E)  # [out, r, E]
            tensors[tensor] = by_rank.transpose(1, 2).reshape(len(by_rank), -1).contiguous()
        save_file(tensors, folder / WEIGHTS)
    return model


def deltas_of(loaded: LoadedAdapter) -> list[Tensor]:
    """ΔW [E, out, in] of gate_up and down."""
    (pairs,) = loaded.model.extras.experts.values()
    assert pairs.gate_up is not None and pairs.down is not None
    return [torch.einsum("ero,eri->eoi", pair.b, pair.a) for pair in (pairs.gate_up, pairs.down)]


def pefts_deltas(model: Any) -> list[Tensor]:
    """The same of PEFT's own layers, which merge them into the parameters."""
    wrappers = {m.parameter_name: m for m in model.modules() if hasattr(m, "parameter_name")}
    found = [wrappers[name].get_delta_weight("default").detach() for name in ("gate_up_proj", "down_proj")]
    return [
        delta if delta.shape[2] == wide else delta.transpose(1, 2) for delta, wide in zip(found, (H, M), strict=True)
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["rank_major", "grouped_by_expert"])
def test_the_layout_that_is_said_is_the_one_that_is_read(name: str, layout: str, tmp_path: Path) -> None:
    model = unmarked(name, tmp_path, grouped=layout == "grouped_by_expert")
    other = "rank_major" if layout == "grouped_by_expert" else "grouped_by_expert"
    with pytest.raises(AdapterRefused) as caught:
        load_on(tmp_path, name)
    refused = caught.value
    assert refused.reason is RefusalCode.AMBIGUOUS_LAYOUT and ".lora_B." in (refused.tensor or "")
    assert "moe_lora_b_layout=rank_major" in refused.fix and "--moe-lora-b-layout" in refused.fix
    right, wrong = (load_on(tmp_path, name, options=ReadOptions(moe_lora_b_layout=each)) for each in (layout, other))
    assert right.model.version != wrong.model.version
    for ours, theirs, another in zip(deltas_of(right), pefts_deltas(model), deltas_of(wrong), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert (another - theirs).abs().max() > 0.1 * theirs.abs().max()
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    write_config(tmp_path, config | {"lora_B_layout": layout})
    assert load_on(tmp_path, name).model.version == right.model.version, "a mark says the same"
    assert load_on(tmp_path, name, options=ReadOptions(moe_lora_b_layout=layout)).model.version == right.model.version
    with pytest.raises(AdapterRefused) as caught:
        load_on(tmp_path, name, options=ReadOptions(moe_lora_b_layout=other))
    assert caught.value.reason is RefusalCode.AMBIGUOUS_LAYOUT
    assert f"lora_B_layout={layout}" in caught.value.why and caught.value.feature == f"moe_lora_b_layout={other}"


def test_a_layout_of_experts_that_are_not_there_is_refused(tmp_path: Path) -> None:
    folder, plans = draft_of(tmp_path), PlanCache()
    options = ReadOptions(moe_lora_b_layout="rank_major")
    write_config(folder, json.loads((folder / CONFIG_NAME).read_text()) | {"lora_B_layout": "rank_major"})
    load(folder, plans=plans)  # the same recipe, and a plan of it
    with pytest.raises(AdapterRefused) as caught:
        load_lora_model(folder, BASE, limits=LIMITS, dtype=torch.float32, plans=plans, options=options)
    assert caught.value.reason is RefusalCode.KEY_UNMATCHED
    assert caught.value.feature == "moe_lora_b_layout=rank_major"


def test_a_layout_of_experts_that_are_stacked_is_refused(tmp_path: Path) -> None:
    """It would be read as it is either way, as two versions."""
    folder = saved(tmp_path, stacked((E, R, H), (E, M, R)))
    load_on(folder, "qwen3_moe")
    with pytest.raises(AdapterRefused) as caught:
        load_on(folder, "qwen3_moe", options=ReadOptions(moe_lora_b_layout="grouped_by_expert"))
    assert caught.value.reason is RefusalCode.KEY_UNMATCHED
    assert caught.value.feature == "moe_lora_b_layout=grouped_by_expert"
