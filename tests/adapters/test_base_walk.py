"""What the walk says of a base: embedding, head, biases, experts, and the rows of fused linears, held against the
models' own code."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GPTBigCodeConfig, GPTBigCodeForCausalLM

from adapters.base_parts import ExpertsShape, HeadShape
from adapters.base_walk import modules_of
from adapters.module_names import linears_of
from tests.conformance.models import CONFIGS, REFUSED_BASES, VOCAB, build, fresh

TIED = {"cohere", "gemma", "gemma2", "gemma3", "gemma3_vl", "gpt2", "gpt_bigcode", "starcoder2", "falcon", "opt"}


@pytest.mark.parametrize("architecture", [*CONFIGS, *REFUSED_BASES])
def test_the_walk_adds_and_changes_nothing_of_the_linears(architecture: str) -> None:
    model = fresh(architecture)
    base, plain = modules_of(model), linears_of(model)
    assert (base.linears, base.excluded, base.groups) == (plain.linears, plain.excluded, plain.groups)
    assert base.linears, "no linear was found"
    assert all(isinstance(model.get_submodule(name), nn.Module) for name in base.linears)


@pytest.mark.parametrize("architecture", [*CONFIGS, *REFUSED_BASES])
def test_a_lookup_is_rows_times_the_scale(architecture: str) -> None:
    model = fresh(architecture)
    shape = modules_of(model).embedding
    assert shape is not None and (shape.num_rows, shape.width) == (VOCAB, 32)
    module = model.get_submodule(shape.name)
    ids = torch.tensor([0, 7, VOCAB - 1])
    torch.testing.assert_close(module(ids), module.weight[ids] * shape.scale)  # type: ignore[index,operator]
    assert (shape.scale == 1.0) == ("gemma" not in architecture)


@pytest.mark.parametrize("architecture", [*CONFIGS, *REFUSED_BASES])
def test_the_head_is_the_last_linear_and_its_tie_the_live_one(architecture: str) -> None:
    model = fresh(architecture)
    head = modules_of(model).head
    assert head is not None
    linear: Any = model.get_submodule(head.name)
    assert isinstance(linear, nn.Linear)
    expected = HeadShape(head.name, 32, VOCAB, architecture == "phi", architecture in TIED)
    assert head == expected
    seen: list[Tensor] = []
    linear.register_forward_hook(lambda _m, args, _y: seen.append(args[0]))
    model(input_ids=torch.tensor([[3, 4]]))
    assert seen and seen[0].shape[-1] == head.in_features


def test_a_tie_shows_without_weights_and_a_config_that_says_otherwise_does_not_matter() -> None:
    with torch.device("meta"):
        outlines = {name: modules_of(build(CONFIGS[name]())).head for name in ("llama", "gemma2", "gemma3_vl")}
    assert {name: head and head.is_tied for name, head in outlines.items()} == {
        "llama": False, "gemma2": True, "gemma3_vl": True
    }  # fmt: skip
    untied: Any = fresh("gemma2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.clone())
    head = modules_of(untied).head
    assert untied.config.tie_word_embeddings and head is not None and not head.is_tied


@pytest.mark.parametrize("architecture", [*CONFIGS, *REFUSED_BASES])
def test_who_has_a_bias(architecture: str) -> None:
    model = fresh(architecture)
    base = modules_of(model)
    parameters = {name for name, _ in model.named_parameters()}
    everyone = {*base.linears, *([base.head.name] if base.head else [])}
    assert base.biased == {name for name in everyone if f"{name}.bias" in parameters}


def test_experts_and_how_they_lie() -> None:
    expected = {
        "qwen3_moe": ExpertsShape(4, 32, 24),
        "mixtral": ExpertsShape(4, 32, 64),
        "gpt_oss": ExpertsShape(4, 32, 64, is_transposed=True, is_interleaved=True),
    }
    for architecture in CONFIGS:
        experts = modules_of(fresh(architecture)).experts
        assert set(experts.values()) == ({expected[architecture]} if architecture in expected else set())
        assert len(experts) == (2 if architecture in expected else 0)


def attended(model: Any) -> dict[str, Tensor]:
    """q, k and v [heads, head_dim] of the first token in the first layer, where rotary embeddings turn nothing."""
    seen: list[dict[str, Tensor]] = []

    def observe(_module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        seen.append({"q_proj": q[0, :, 0], "k_proj": k[0, :, 0], "v_proj": v[0, :, 0]})
        return torch.zeros_like(q).transpose(1, 2), None

    AttentionInterface.register("observing", observe)
    model.set_attn_implementation("observing")
    model(input_ids=torch.tensor([[5, 6]]))
    return seen[0]


def bigcode_with_all_heads() -> nn.Module:
    config = GPTBigCodeConfig(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64, multi_query=False)
    return GPTBigCodeForCausalLM._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("architecture", ["phi3", "gpt2", "gpt_bigcode", "gpt_bigcode with all heads"])
def test_the_rows_of_a_fused_linear_are_what_attention_gets(architecture: str) -> None:
    model = bigcode_with_all_heads() if " " in architecture else fresh(architecture)
    base = modules_of(model)
    fused = next(name for name in base.fused if "attn" in name)
    outputs: list[Tensor] = []
    model.get_submodule(fused).register_forward_hook(lambda _m, _x, y: outputs.append(y.reshape(2, -1)[0]))
    heads = attended(model)
    assert [part.name for part in base.fused[fused]] == ["q_proj", "k_proj", "v_proj"]
    for part in base.fused[fused]:
        rows = torch.cat([outputs[0][begin:end] for begin, end in part.rows])
        torch.testing.assert_close(rows, heads[part.name].flatten())


def test_gate_and_up_of_phi3_are_halves() -> None:
    model = fresh("phi3")
    base = modules_of(model)
    gate, up = base.fused["model.layers.0.mlp.gate_up_proj"]
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    x = torch.randn(1, 3, 32)
    y = mlp.gate_up_proj(x)
    cut = {part.name: y[..., part.rows[0][0] : part.rows[0][1]] for part in (gate, up)}
    expected = mlp.down_proj(cut["up_proj"] * mlp.activation_fn(cut["gate_proj"]))
    torch.testing.assert_close(mlp(x), expected)


def test_layouts_that_are_not_known_have_no_entry() -> None:
    for architecture in ("gpt_neox", "falcon", "llama", "gpt_oss"):
        assert modules_of(fresh(architecture)).fused == {}


def test_an_embedding_that_computes_something_else_is_not_one() -> None:
    class Odd(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).tanh()

    model: Any = fresh("llama")
    odd = Odd(VOCAB, 32)
    model.set_input_embeddings(odd)
    assert modules_of(model).embedding is None
