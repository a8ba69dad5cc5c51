"""Whole modules, biases and trained tokens in PEFT's files: found under all spellings, marked as what they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig

from adapters.errors import AdapterRefused, RefusalCode
from adapters.proposal import Proposal, TokensProposal, VectorProposal, WholeProposal
from adapters.propose import propose
from adapters.recipe import read_recipe
from tests.adapters.peft_files import PREFIX, assert_same, consumed, header_of, llama, qwen2, save

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
NORMS = [f"model.layers.{i}.{name}_layernorm" for i in (0, 1) for name in ("input", "post_attention")]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | fields))


def proposed(folder: Path, config: LoraConfig, **options: Any) -> Proposal:
    saved = save(folder, config, loaded=False, **options)
    proposal = saved.propose()
    assert sorted(consumed(proposal)) == sorted(saved.entries)
    return proposal


def wholes(proposal: Proposal) -> dict[str, bool]:
    return {whole.source: whole.is_copy for whole in proposal.wholes}


def test_saved_modules_replace_the_bases(tmp_path: Path) -> None:
    saved = save(tmp_path, lora(modules_to_save=["lm_head", "norm", "embed_tokens"]))
    proposal = saved.propose()
    assert sorted(consumed(proposal)) == sorted(saved.entries)
    assert wholes(proposal) == {EMBEDDING: False, HEAD: False}
    assert {(v.kind, v.source) for v in proposal.vectors} == {("norm", name) for name in [*NORMS, "model.norm"]}
    assert proposal.features == ("modules_to_save",)
    for item in (*proposal.wholes, *proposal.vectors):
        stored = saved.tensors[item.weight if isinstance(item, WholeProposal) else item.input]  # type: ignore[index]
        assert torch.equal(stored, saved.layer(item.source).modules_to_save["default"].weight)


def test_a_module_that_was_saved_twice_is_taken_once(tmp_path: Path) -> None:
    config = lora(modules_to_save=["lm_head", "embed_tokens"])
    proposal = proposed(tmp_path, config, save_embedding_layers=True)
    assert wholes(proposal) == {EMBEDDING: False, HEAD: False}
    assert [whole.weight for whole in proposal.wholes] == [f"{PREFIX}{HEAD}.weight", f"{PREFIX}{EMBEDDING}.weight"]
    assert sorted(key.removeprefix(PREFIX) for key in proposal.dropped) == [
        f"{module}.{part}.weight" for module in (HEAD, EMBEDDING) for part in ("modules_to_save", "original_module")
    ]


@pytest.mark.parametrize("infix", ["", ".default"])
def test_older_spellings_of_a_saved_module(infix: str, tmp_path: Path) -> None:
    a_and_b = {f"q_proj.lora_A{infix}.weight": (2, 16), f"q_proj.lora_B{infix}.weight": (16, 2)}
    saved = {f"lm_head.modules_to_save{infix}.weight": (40, 16), f"lm_head.modules_to_save{infix}.bias": (40,)}
    proposal = propose(recipe(modules_to_save=["lm_head"]), header_of(a_and_b | saved, tmp_path))
    weight, bias = saved
    assert proposal.wholes == (WholeProposal(source="lm_head", weight=weight, bias=bias),)


def test_copies_of_the_base_are_marked(tmp_path: Path) -> None:
    bare = proposed(tmp_path / "bare", lora(), save_embedding_layers=True)
    assert wholes(bare) == {EMBEDDING: True, HEAD: True}
    beside = proposed(tmp_path / "beside", lora(target_modules=["embed_tokens"]), base=lambda: llama(tied=True))
    assert wholes(beside) == {EMBEDDING: True}
    tied = lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert wholes(proposed(tmp_path / "tied", tied, base=lambda: llama(tied=True))) == {EMBEDDING: False, HEAD: True}


def test_trained_tokens_are_rows_in_the_order_of_the_config(tmp_path: Path) -> None:
    saved = save(tmp_path, lora(trainable_token_indices=[7, 3, 5]))
    proposal = saved.propose()
    (tokens,) = proposal.tokens
    assert (tokens.source, tokens.ids, tokens.is_only) == (EMBEDDING, (7, 3, 5), True)
    looked_up = saved.layer(EMBEDDING)(torch.tensor(tokens.ids)).detach()
    assert_same(saved.tensors[tokens.input], looked_up)
    assert proposal.features == ("trainable tokens",)


def test_trained_tokens_of_two_modules(tmp_path: Path) -> None:
    proposal = proposed(tmp_path, lora(trainable_token_indices={"embed_tokens": [3, 1], "lm_head": [2]}))
    assert [(tokens.source, tokens.ids, tokens.is_only) for tokens in proposal.tokens] == [
        (HEAD, (2,), False), (EMBEDDING, (3, 1), False),
    ]  # fmt: skip


def test_trained_tokens_beside_copies(tmp_path: Path) -> None:
    proposal = proposed(tmp_path, lora(trainable_token_indices=[3, 1]), save_embedding_layers=True)
    assert wholes(proposal) == {EMBEDDING: True, HEAD: True}
    assert isinstance(proposal.tokens[0], TokensProposal)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_absolute(bias: str, tmp_path: Path) -> None:
    saved = save(tmp_path, lora(bias=bias), base=qwen2)
    proposal = saved.propose()
    assert sorted(consumed(proposal)) == sorted(saved.entries)
    kinds = ("q", "k", "v") if bias == "all" else ("q",)
    assert {(v.kind, v.source) for v in proposal.vectors} == {
        ("bias", f"model.layers.{i}.self_attn.{kind}_proj") for i in (0, 1) for kind in kinds
    }
    for vector in proposal.vectors:
        assert torch.equal(saved.tensors[vector.input], saved.layer(vector.source).bias.detach())
    assert (proposal.features, proposal.warnings) == (("bias",), ())


def test_a_bias_the_config_does_not_speak_of_is_served_with_a_warning(tmp_path: Path) -> None:
    shapes = {"q.lora_A.weight": (2, 16), "q.lora_B.weight": (16, 2), "q.base_layer.bias": (16,)}
    proposal = propose(recipe(), header_of(shapes, tmp_path))
    assert proposal.vectors == (VectorProposal(kind="bias", source="q", input="q.base_layer.bias"),)
    assert "bias=none" in proposal.warnings[0]


def test_other_methods_save_modules_in_the_same_way(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["lm_head"])
    assert wholes(proposed(tmp_path, config)) == {HEAD: False}


def recipe(**fields: Any) -> Any:
    return read_recipe(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields).encode())


PAIR = {"q.lora_A.weight": (2, 16), "q.lora_B.weight": (16, 2)}
TOKENS = {"e.token_adapter.trainable_tokens_delta": (2, 16)}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], RefusalCode, str]] = {
    "ids, no rows": ({"trainable_token_indices": [1]}, {}, RefusalCode.INCOMPLETE_PAIR, "trainable_token_indices"),
    "rows, no ids": ({}, TOKENS, RefusalCode.INCOMPLETE_PAIR, "trainable_tokens_delta"),
    "rows, ids of another": ({"trainable_token_indices": {"f": [1, 2]}}, TOKENS, RefusalCode.INCOMPLETE_PAIR, "delta"),
    "two lists": (
        {"trainable_token_indices": {"e": [1, 2], "m.e": [1, 2]}},
        {"m.e.token_adapter.trainable_tokens_delta": (2, 16)},
        RefusalCode.AMBIGUOUS_LAYOUT,
        "2 entries",
    ),
    "too few rows": ({"trainable_token_indices": [1, 2, 3]}, TOKENS, RefusalCode.SHAPE_MISMATCH, "lists 3 tokens"),
    "twice the same id": ({"trainable_token_indices": [1, 1]}, TOKENS, RefusalCode.CORRUPT, "different integers"),
    "an id that is a bool": ({"trainable_token_indices": [1, True]}, TOKENS, RefusalCode.CORRUPT, "integers"),
    "nothing saved": ({"modules_to_save": ["lm_head"]}, {}, RefusalCode.INCOMPLETE_PAIR, "lm_head"),
    "a classifier": ({"task_type": "SEQ_CLS"}, {"score.weight": (2, 16)}, RefusalCode.UNSUPPORTED, "score.weight"),
    "two wholes": (
        {}, {"h.weight": (4, 4), "h.base_layer.weight": (4, 4)}, RefusalCode.AMBIGUOUS_LAYOUT, "h.weight",
    ),
    "a convolution's": ({}, {"conv.weight": (4, 4, 3)}, RefusalCode.UNSUPPORTED, "3 dimensions"),
    "an original alone": ({}, {"h.original_module.bias": (4,)}, RefusalCode.INCOMPLETE_PAIR, "h.original_module.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused_by_name(name: str, tmp_path: Path) -> None:
    fields, shapes, code, named = REFUSED[name]
    with pytest.raises(AdapterRefused) as caught:
        propose(recipe(**fields), header_of(PAIR | shapes, tmp_path))
    assert caught.value.reason is code
    assert named in str(caught.value)
    assert caught.value.tensor or caught.value.feature
