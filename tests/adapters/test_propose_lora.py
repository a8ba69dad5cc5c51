"""What PEFT's LoRA files mean, against PEFT's own layers: every tensor once, every ΔW to a millionth."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BdLoraConfig, LoraConfig, MontecloraConfig, VeloraConfig

from adapters.key_roles import read_keys
from adapters.proposal import PairProposal
from adapters.propose import propose
from adapters.recipe import read_recipe
from tests.adapters.peft_files import LAYER, PREFIX, Saved, assert_same, consumed, delta, header_of, llama, qwen2, save

O_PROJ = LAYER + "self_attn.o_proj"
TARGETS = ["q_proj", "o_proj", "down_proj"]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | fields))


def pairs_of(saved: Saved) -> dict[str, PairProposal]:
    """By module; all tensors of the file are accounted for, each once."""
    proposal = saved.propose()
    assert sorted(consumed(proposal)) == sorted(saved.entries)
    return {pair.source: pair for pair in proposal.pairs}


def assert_deltas(saved: Saved) -> None:
    pairs = pairs_of(saved)
    assert pairs
    for module, pair in pairs.items():
        layer = saved.layer(module)
        assert_same(delta(pair, saved.tensors, layer.base_layer), layer.get_delta_weight("default"))


PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 6}, "alpha_pattern": {r"layers\.1\..*": 32}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
    "expression": {"target_modules": r".*\.1\..*(q|k)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "lm_head": {"target_modules": ["lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "mica": {"init_lora_weights": "mica"},
    "fan_in_fan_out": {"fan_in_fan_out": False},
    "velora": {"velora_config": VeloraConfig(num_groups=2)},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "alora": {"alora_invocation_tokens": [3, 4, 3], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("name", PLAIN)
def test_pairs_are_pefts(name: str, tmp_path: Path) -> None:
    assert_deltas(save(tmp_path, lora(**PLAIN[name])))


def test_what_acts_in_training_alone_is_dropped_by_name(tmp_path: Path) -> None:
    velora = save(tmp_path / "v", lora(velora_config=VeloraConfig(num_groups=2))).propose()
    assert {key.rpartition(".")[2] for key in velora.dropped} == {"lora_velora_embed"}
    monteclora = save(tmp_path / "m", lora(monteclora_config=MontecloraConfig())).propose()
    assert len(monteclora.dropped) == 4 * len(monteclora.pairs)
    assert all(".lora_monteclora_sampler." in key for key in monteclora.dropped)


def test_invocation_tokens(tmp_path: Path) -> None:
    proposal = save(tmp_path, lora(alora_invocation_tokens=[3, 4, 3], task_type="CAUSAL_LM")).propose()
    assert proposal.invocation_tokens == (3, 4, 3)
    assert "alora" in proposal.features


@pytest.mark.parametrize(("a", "b"), [(["o_proj"], ["q_proj"]), (["q_proj", "down"], []), ([], ["proj"])])
def test_blocks(a: list[str], b: list[str], tmp_path: Path) -> None:
    blocks = BdLoraConfig(target_modules_bd_a=a, target_modules_bd_b=b, nblocks=2, match_strict=False)
    saved = save(tmp_path, lora(use_bdlora=blocks))
    pairs = pairs_of(saved)
    assert len(pairs) == 6
    for module, pair in pairs.items():
        layer = saved.layer(module)
        variant = layer.lora_variant["default"]
        theirs = variant.merge_safe(layer, "default", torch.zeros_like(layer.base_layer.weight))
        assert_same(delta(pair, saved.tensors, layer.base_layer), theirs)


def test_qalora_pools_as_its_own_forward_does(tmp_path: Path) -> None:
    """PEFT has the pooled layer for GPTQ's linears alone, so its variant is put onto a plain layer here."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    saved = save(tmp_path, lora(use_qalora=True, qalora_group_size=4, target_modules=["o_proj"]))
    layer = saved.layer(O_PROJ)
    QALoraLinearVariant.init(layer, "default", saved.model.peft_config["default"])
    stored_a = torch.randn(4, 4)
    layer.lora_A["default"].weight.data.copy_(stored_a)
    key = f"{PREFIX}{O_PROJ}.lora_A.weight"
    tensors = saved.tensors | {key: stored_a}
    entries = header_of({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tmp_path)
    pair = next(pair for pair in propose(saved.recipe, entries).pairs if pair.source == O_PROJ)
    x = torch.eye(16)
    theirs = QALoraLinearVariant.forward(layer, "default", x, torch.zeros(16, 16))  # [in, out]
    assert_same(delta(pair, tensors, layer.base_layer).T, theirs)


def test_qalora_on_a_plain_base_is_a_plain_pair(tmp_path: Path) -> None:
    assert_deltas(save(tmp_path, lora(use_qalora=True, qalora_group_size=4)))


def test_lora_bias_is_scaled_with_b(tmp_path: Path) -> None:
    saved = save(tmp_path, lora(lora_bias=True, use_rslora=True))
    for module, pair in pairs_of(saved).items():
        layer = saved.layer(module)
        x = torch.zeros(1, layer.in_features)
        assert pair.bias is not None
        assert_same(pair.scale * saved.tensors[pair.bias], (layer(x) - layer.base_layer(x))[0])


@pytest.mark.parametrize("base", [llama, qwen2])
def test_dora(base: Any, tmp_path: Path) -> None:
    """g ⊙ (W x + s B A x) + b with g = m / ‖W + s B A‖, by PEFT's forward."""
    saved = save(tmp_path, lora(use_dora=True), base=base)
    for module, pair in pairs_of(saved).items():
        layer = saved.layer(module)
        changed = layer.base_layer.weight + delta(pair, saved.tensors, layer.base_layer)  # [out, in]
        assert pair.magnitude is not None and not pair.gain_covers_bias
        gain = saved.tensors[pair.magnitude] / changed.norm(dim=1)
        x = torch.randn(3, layer.in_features)
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias
        assert_same(gain * (x @ changed.T) + bias, layer(x).detach())


@pytest.mark.parametrize("ending", ["", ".weight", ".default", ".default.weight"])
def test_all_spellings_of_a_magnitude_are_one(ending: str, tmp_path: Path) -> None:
    saved = save(tmp_path, lora(use_dora=True))
    renamed = {}
    for key, entry in saved.entries.items():
        new = key + ending if key.endswith("magnitude_vector") else key
        if "default" in ending and ".lora_" in key and not key.endswith("magnitude_vector"):
            new = key.replace(".weight", ".default.weight")
        renamed[new] = dataclasses.replace(entry, name=new)
    proposal = propose(saved.recipe, renamed)
    assert [pair.magnitude for pair in proposal.pairs] == [
        f"{PREFIX}{pair.source}.lora_magnitude_vector{ending}" for pair in proposal.pairs
    ]


def test_torchtunes_dora_is_served_as_what_it_is(tmp_path: Path) -> None:
    saved = save(tmp_path, lora(use_dora=True, target_modules=["v_proj", "o_proj", "down_proj"]))
    config = {name: saved.config[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")}
    proposal = propose(read_recipe(str(config).replace("'", '"').encode()), saved.entries)
    assert len(proposal.pairs) == 6
    assert all(pair.magnitude and pair.gain_covers_bias for pair in proposal.pairs)
    assert "torchtune" in " ".join(proposal.warnings)


def test_an_embedding(tmp_path: Path) -> None:
    """PEFT's lookup is E[x] + s · A[:, x]ᵀ Bᵀ, and its head's pair is a linear's; both bring copies of the base."""
    saved = save(tmp_path, lora(target_modules=["embed_tokens", "lm_head"], use_rslora=True))
    proposal = saved.propose()
    assert sorted(consumed(proposal)) == sorted(saved.entries)
    (embedding,), (head,) = proposal.embeddings, proposal.pairs
    layer = saved.layer("model.embed_tokens")
    lora_a, lora_b = saved.tensors[embedding.lora_a], saved.tensors[embedding.lora_b]
    assert (embedding.source, embedding.lora_rank, embedding.declared_rank) == ("model.embed_tokens", 4, 4)
    assert embedding.scale == pytest.approx(6 / math.sqrt(4))
    assert_same(embedding.scale * (lora_b @ lora_a).T, layer.get_delta_weight("default"))
    assert head.source == "lm_head"
    assert [(whole.source, whole.is_copy) for whole in proposal.wholes] == [
        ("lm_head", True), ("model.embed_tokens", True),
    ]  # fmt: skip
    assert proposal.features == ("rslora", "embedding", "base copies")


def test_dora_on_an_embedding(tmp_path: Path) -> None:
    proposal = save(tmp_path, lora(use_dora=True, target_modules=["embed_tokens"])).propose()
    (embedding,) = proposal.embeddings
    assert embedding.magnitude == f"{PREFIX}model.embed_tokens.lora_magnitude_vector"


WRAPPED = [
    ("", ""),
    ("module.", ""),
    ("_orig_mod.module.", ""),
    ("", "_fsdp_wrapped_module."),
    ("_fsdp_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
]


@pytest.mark.parametrize(("front", "inside"), WRAPPED)
@pytest.mark.parametrize("infix", ["", ".default", ".my-adapter"])
def test_wrappers_and_adapter_names_are_taken_off(front: str, inside: str, infix: str) -> None:
    halves = [f"lora_A{infix}.weight", f"lora_B{infix}.weight"]
    keys = [f"{front}{PREFIX}model.layers.0.{inside}q_proj.{half}" for half in halves]
    assert {key.module for key in read_keys(keys)} == {"model.layers.0.q_proj"}
    assert [key.role.name for key in read_keys(keys)] == ["A", "B"]
