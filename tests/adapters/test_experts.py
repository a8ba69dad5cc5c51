"""Pairs of fused experts, from every way they are stored, against PEFT's own sums and per-expert mathematics."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from adapters.adapter_extras import ExpertPair, ExpertPairs
from adapters.base_parts import ExpertsShape
from adapters.expert_layout import Projection, fused_pair, joined, product_of, side_of_a
from adapters.expert_sites import ExpertsPart
from adapters.lora_experts import FusedExperts, PlainProduct

E, K, H, M = 4, 2, 32, 24  # experts, of which a token has k, hidden and intermediate sizes
COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_experts_per_tok": K, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def qwen3_moe() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, num_experts=E, moe_intermediate_size=M, intermediate_size=M, decoder_sparse_step=1)
    )


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=E, intermediate_size=M))


def gpt_oss() -> PreTrainedModel:
    return GptOssForCausalLM(GptOssConfig(**COMMON, num_local_experts=E, intermediate_size=M))


MODELS = {"qwen3_moe": qwen3_moe, "mixtral": mixtral, "gpt_oss": gpt_oss}
SHAPES = {name: ExpertsShape(E, H, M, name == "gpt_oss", name == "gpt_oss") for name in MODELS}


def fresh(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # transformers leaves some as they were allocated
        parameter.data = 0.1 * torch.randn(parameter.shape)
    return model


def experts_of(model: nn.Module) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("mlp.experts"))


def experts_with_pairs(
    stock: nn.Module, x: Tensor, index: Tensor, weights: Tensor, parts: list[tuple[float, ExpertPairs]]
) -> Tensor:
    fused = FusedExperts(stock, PlainProduct(stock, "gate_up_proj"), PlainProduct(stock, "down_proj"))
    return fused.run(x, index, weights, [ExpertsPart(w, pairs, torch.arange(len(x))) for w, pairs in parts])


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, H, generator=generator)
    index = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(7)])
    return x, index, torch.rand(7, K, generator=generator)


def adapted(make: Callable[[], PreTrainedModel], *targets: str, **settings: Any) -> nn.Module:
    config = LoraConfig(r=3, lora_alpha=9, target_modules=[], target_parameters=list(targets), **settings)
    model = get_peft_model(fresh(make), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    return model.eval()


def wrapper_of(model: nn.Module, parameter: str) -> Any:
    return next(m for m in model.modules() if getattr(m, "parameter_name", None) == parameter)


def pair_of(wrapper: Any, shape: ExpertsShape, *, is_down: bool) -> ExpertPair:
    a, b = wrapper.lora_A["default"].weight.detach(), wrapper.lora_B["default"].weight.detach()
    side = side_of_a(
        a.shape[1], product_of(shape, is_down=is_down), is_transposed=shape.is_transposed, peft_version=None
    )
    assert side is not None
    return fused_pair(a, b, num_experts=E, side=side, layout="rank_major", scale=wrapper.scaling["default"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids="+".join)
def test_what_peft_trains_is_served(name: str, targets: tuple[str, ...]) -> None:
    shape, x = SHAPES[name], inputs()
    model = adapted(MODELS[name], *(f"mlp.experts.{target}" for target in targets))
    found = {t: pair_of(wrapper_of(model, t), shape, is_down=t == "down_proj") for t in targets}
    pairs = ExpertPairs(gate_up=found.get("gate_up_proj"), down=found.get("down_proj"))
    stock = experts_of(fresh(MODELS[name]))
    with torch.no_grad():
        outer = next(m for n, m in model.named_modules() if n.endswith("mlp.experts"))
        theirs, base = outer(*x), stock(*x)
        ours = experts_with_pairs(stock, *x, [(1.0, pairs)])
        half = experts_with_pairs(stock, *x, [(0.5, pairs), (0.5, pairs)])
        nothing = experts_with_pairs(stock, *x, [])
    assert (theirs - base).abs().max() > 1e-2 * base.abs().max()
    for found_y, wanted in ((ours, theirs), (half, theirs), (nothing, base)):
        assert (found_y - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_the_way_unsloth_grouped_b_is_another_adapter(name: str) -> None:
    """Read in the wrong layout, the same file gives other weights: nothing but the marker tells."""
    model = adapted(MODELS[name], "mlp.experts.down_proj")
    wrapper = wrapper_of(model, "down_proj")
    a, b = wrapper.lora_A["default"].weight.detach(), wrapper.lora_B["default"].weight.detach()
    grouped = b.view(len(b), 3, E).transpose(1, 2).reshape(len(b), -1)  # what a grouped file of the same pairs holds
    wanted = pair_of(wrapper, SHAPES[name], is_down=True)
    read = [
        fused_pair(a, stored, num_experts=E, side="input", layout=layout, scale=3.0)
        for stored, layout in ((grouped, "grouped_by_expert"), (grouped, "rank_major"))
    ]  # type: ignore[arg-type]
    assert torch.equal(read[0].b, wanted.b) and torch.equal(read[0].a, wanted.a)
    assert (read[1].b - wanted.b).abs().max() > 0.1


def test_adapters_older_than_peft_0_19_stand_on_the_other_side() -> None:
    """They had in and out of a parameter stored [E, out, in] the other way round; PEFT's sum then was "e i o"."""
    shape = SHAPES["qwen3_moe"]
    for is_down, parameter in ((False, "gate_up_proj"), (True, "down_proj")):
        product = product_of(shape, is_down=is_down)
        torch.manual_seed(3)
        a, b = torch.randn(E * 3, product.out_features), torch.randn(product.in_features, 3 * E)
        delta = 3.0 * torch.einsum("ore,eri->eio", b.view(len(b), -1, E), a.view(E, -1, a.shape[1]))  # [E, out, in]
        side = side_of_a(a.shape[1], product, is_transposed=False, peft_version=(0, 18))
        assert side == "output"
        pair = fused_pair(a, b, num_experts=E, side=side, layout="rank_major", scale=3.0)
        stock = experts_of(fresh(qwen3_moe))
        pairs = ExpertPairs(None, pair) if is_down else ExpertPairs(pair, None)
        with torch.no_grad():
            ours = experts_with_pairs(stock, *inputs(), [(1.0, pairs)])
            getattr(stock, parameter).add_(delta)
            theirs = stock(*inputs())
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_square_product_needs_to_be_told() -> None:
    square = product_of(ExpertsShape(E, 32, 16), is_down=False)
    told = [side_of_a(32, square, is_transposed=False, peft_version=version) for version in (None, (0, 18), (0, 19))]
    assert told == [None, "output", "input"]
    assert side_of_a(32, square, is_transposed=True, peft_version=None) == "input"
    with pytest.raises(ValueError, match="A reads 31 features, the product has 32 and 32"):
        side_of_a(31, square, is_transposed=False, peft_version=None)


@pytest.mark.parametrize("name", MODELS)
def test_pairs_of_single_experts_are_joined(name: str) -> None:
    """Each projection keeps its own rank and scale; the truth is what each expert's weights would be, merged."""
    shape, x = SHAPES[name], inputs()
    torch.manual_seed(4)
    parts: dict[tuple[int, Projection], tuple[Tensor, Tensor, float]] = {}
    sizes: dict[Projection, tuple[int, int, int]] = {"gate": (2, H, M), "up": (3, H, M), "down": (4, M, H)}
    kinds: list[Projection] = ["gate", "up", "down"]
    for expert, kind in itertools.product((0, 1, 3), kinds):
        if (expert, kind) != (1, "gate"):  # nothing says that all are there
            rank, width, out = sizes[kind]
            parts[expert, kind] = (0.1 * torch.randn(rank, width), 0.1 * torch.randn(out, rank), 4 / rank**0.5)
    pairs = ExpertPairs(
        gate_up=joined({k: v for k, v in parts.items() if k[1] != "down"}, shape, is_down=False),
        down=joined({k: v for k, v in parts.items() if k[1] == "down"}, shape, is_down=True),
    )
    stock = experts_of(fresh(MODELS[name]))
    with torch.no_grad():
        base, ours = stock(*x), experts_with_pairs(stock, *x, [(1.0, pairs)])
        for (expert, kind), (a, b, scale) in parts.items():
            merge(stock, shape, expert, kind, scale * b @ a)
        theirs = stock(*x)
    assert (theirs - base).abs().max() > 1e-2 * base.abs().max()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def merge(stock: Any, shape: ExpertsShape, expert: int, kind: str, delta: Tensor) -> None:
    """Add ΔW [out, in] of one projection to where transformers keeps it."""
    fused = (stock.down_proj if kind == "down" else stock.gate_up_proj)[expert]
    fused = fused.T if shape.is_transposed else fused  # [out, in], a view
    if kind == "down":
        fused += delta
    elif shape.is_interleaved:
        fused[int(kind == "up") :: 2] += delta
    else:
        fused[: shape.intermediate_size] += delta if kind == "gate" else 0
        fused[shape.intermediate_size :] += delta if kind == "up" else 0
