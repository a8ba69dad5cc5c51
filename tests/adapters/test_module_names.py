"""Which modules a base offers, and how names reach them: exactly, by one exchange of a prefix, or not at all."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from adapters.errors import AdapterRefused, RefusalCode
from adapters.key_roles import read_keys
from adapters.module_names import BaseModules, LinearShape, linears_of, resolve
from adapters.tensor_names import common_wrapper

SHAPE = LinearShape(8, 8)


def base_of(*names: str, excluded: dict[str, str] | None = None) -> BaseModules:
    return BaseModules("test", dict.fromkeys(names, SHAPE), excluded or {})


def tiny_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip


def test_llama() -> None:
    base = linears_of(LlamaForCausalLM(tiny_llama()))
    assert base.model_type == "llama"
    assert len(base.linears) == 14
    assert base.linears["model.layers.1.self_attn.k_proj"] == LinearShape(16, 8)
    assert base.linears["model.layers.0.mlp.down_proj"] == LinearShape(24, 16)
    assert set(base.excluded) == {"lm_head", "model.embed_tokens"}


def test_gpt2_keeps_its_weights_the_other_way_round() -> None:
    base = linears_of(GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=4, n_positions=32)))
    assert base.linears == {
        "transformer.h.0.attn.c_attn": LinearShape(16, 48),
        "transformer.h.0.attn.c_proj": LinearShape(16, 16),
        "transformer.h.0.mlp.c_fc": LinearShape(16, 64),
        "transformer.h.0.mlp.c_proj": LinearShape(64, 16),
    }
    assert set(base.excluded) == {"transformer.wte", "transformer.wpe", "lm_head"}


class OddLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class FalconLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


def test_a_subclass_that_computes_a_linear_in_its_own_words_is_one() -> None:
    assert linears_of(nn.Sequential(FalconLinear(6, 4), FalconLinear(4, 6, bias=False))).linears == {
        "0": LinearShape(6, 4), "1": LinearShape(4, 6)
    }  # fmt: skip


def test_modules_where_lora_would_be_wrong_or_idle_are_excluded() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(4, 4)
            self.odd = OddLinear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.experts = nn.ModuleList([nn.Linear(4, 4)])
            self.vision_tower = nn.Sequential(nn.Linear(4, 4))
            self.embedding = nn.Embedding(8, 4)
            self.tied = nn.Linear(4, 8, bias=False)
            self.tied.weight = self.embedding.weight

    base = linears_of(Model())
    assert set(base.linears) == {"plain"}
    assert set(base.excluded) == {
        "odd", "attention.out_proj", "experts.0", "vision_tower.0", "embedding", "tied"
    }  # fmt: skip


def test_exact_names_are_left_alone() -> None:
    resolution = resolve(["model.layers.0.q"], base_of("model.layers.0.q", "layers.0.q"))
    assert (resolution.modules, resolution.rewrite) == ({"model.layers.0.q": "model.layers.0.q"}, "")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("layers.0.q", "model.layers.0.q"),
        ("model.layers.0.q", "layers.0.q"),
        ("model.layers.0.q", "model.language_model.layers.0.q"),
        ("language_model.model.layers.0.q", "model.language_model.layers.0.q"),
        ("h.0.c_attn", "transformer.h.0.c_attn"),
    ],
)
def test_one_exchange_of_a_prefix(name: str, module: str) -> None:
    resolution = resolve([name, name + "2"], base_of(module, module + "2"))
    assert resolution.modules == {name: module, name + "2": module + "2"}
    assert "→" in resolution.rewrite


def test_the_names_of_a_headless_model_reach_the_one_with_a_head() -> None:
    headless, whole = linears_of(LlamaModel(tiny_llama())), linears_of(LlamaForCausalLM(tiny_llama()))
    resolution = resolve(list(headless.linears), whole)
    assert sorted(resolution.modules.values()) == sorted(whole.linears)


def test_two_exchanges_that_fit_are_refused() -> None:
    with pytest.raises(AdapterRefused) as caught:
        resolve(["layers.0.q"], base_of("model.layers.0.q", "language_model.layers.0.q"))
    assert caught.value.reason is RefusalCode.AMBIGUOUS_LAYOUT


def test_an_exchange_must_fit_all_names() -> None:
    with pytest.raises(AdapterRefused) as caught:
        resolve(["layers.0.q_proj", "layers.0.x_proj"], base_of("model.layers.0.q_proj", "model.layers.0.k_proj"))
    assert caught.value.reason is RefusalCode.KEY_UNMATCHED
    assert "2 of 2 targeted modules" in str(caught.value)
    assert "model.layers.0.q_proj" in caught.value.fix


def test_an_excluded_module_is_named_with_its_reason() -> None:
    with pytest.raises(AdapterRefused) as caught:
        resolve(["lm_head"], base_of("model.q", excluded={"lm_head": "LoRA on lm_head is not served"}))
    assert caught.value.reason is RefusalCode.UNSUPPORTED
    assert caught.value.feature == "target_modules=lm_head"


@pytest.mark.parametrize(
    ("keys", "wrapper"),
    [
        (["base_model.model.a.lora_A.weight", "base_model.model.b.lora_A.weight"], "base_model.model."),
        (["module.base_model.model.a.x", "module.base_model.model.b.x"], "module.base_model.model."),
        (["base_model.model.a.x", "b.x"], ""),
        (["model.a.x"], ""),
    ],
)
def test_a_wrapper_is_what_all_names_share(keys: list[str], wrapper: str) -> None:
    assert common_wrapper(keys) == wrapper


def test_an_adapter_name_inside_is_taken_off() -> None:
    plain, inside = read_keys(["a.lora_A.weight"])[0], read_keys(["a.lora_A.default.weight"])[0]
    assert (plain.module, plain.role.name) == (inside.module, inside.role.name) == ("a", "A")
