"""The fused rotary embedding gives the stock function's bits, for the swapped modules only."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from server.engine import fused_rotary
from server.engine.fused_rotary import FusedRotary, fuse_rotary

DTYPES = [torch.bfloat16, torch.float32]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS: dict[str, tuple[PreTrainedConfig, int]] = {
    "llama": (LlamaConfig(**SIZES), 2),
    "mistral": (MistralConfig(**SIZES), 2),
    "qwen2": (Qwen2Config(**SIZES), 2),
    "qwen3": (Qwen3Config(**SIZES, head_dim=32), 2),
    "gemma3": (Gemma3TextConfig(**SIZES, head_dim=32), 2),
    "phi3": (Phi3Config(**SIZES), 2),
    "phi3-partial": (Phi3Config(**SIZES, partial_rotary_factor=0.5), 2),  # swapped; every call goes to the stock one
    "cohere-interleaved": (CohereConfig(**SIZES), 0),
    "neox-partial": (GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}), 2),
}


def build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def rotate_of(dtype: torch.dtype) -> fused_rotary.Rotate:
    """The function the kernel stands behind, in the place of Llama's."""
    return fused_rotary._rotate_by_kernel(modeling_llama.apply_rotary_pos_emb, dtype)


def inputs(num_tokens: int, num_heads: int, num_kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k as attention cuts them from a linear's output; cos, sin."""
    torch.manual_seed(num_tokens)
    q, k = (torch.randn(1, num_tokens, heads, dim).to(dtype).transpose(1, 2) for heads in (num_heads, num_kv_heads))
    angles = torch.randn(1, num_tokens, dim // 2).repeat(1, 1, 2)
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


def assert_same_bits(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, stock in zip(found, expected, strict=True):
        assert ours.dtype is stock.dtype and torch.equal(ours, stock)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(CONFIGS))
@torch.inference_mode()
def test_a_model_keeps_its_bits(name: str, dtype: torch.dtype) -> None:
    config, num_expected = CONFIGS[name]
    model = build(config, dtype)
    ids = torch.arange(24)[None]
    before = model(input_ids=ids, use_cache=False).logits
    assert fuse_rotary(model) == num_expected
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert fuse_rotary(model) == 0, "a module is swapped once"


@torch.inference_mode()
def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[bool] = []
    is_served = fused_rotary._is_served
    model = build(CONFIGS["qwen3"][0], torch.bfloat16)
    fuse_rotary(model)
    monkeypatch.setattr(fused_rotary, "_is_served", lambda *args: served.append(is_served(*args)) or served[-1])
    model(input_ids=torch.arange(5)[None], use_cache=False)
    assert served == [True, True]


@torch.inference_mode()
def test_the_stock_classes_and_other_models_stay_as_they_are() -> None:
    stock, function = modeling_llama.LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb
    model, other = (build(CONFIGS["llama"][0], torch.bfloat16) for _ in range(2))
    fuse_rotary(model)
    fused = [module for module in model.modules() if isinstance(module, FusedRotary)]
    assert all(isinstance(module, modeling_llama.LlamaAttention) for module in fused) and len(fused) == 2
    assert modeling_llama.LlamaAttention.forward is stock and modeling_llama.apply_rotary_pos_emb is function
    assert not any(isinstance(module, FusedRotary) for module in other.modules())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize("dim", [64, 96, 10])
@torch.inference_mode()
def test_the_bits_are_the_stock_functions(dtype: torch.dtype, heads: tuple[int, int], dim: int) -> None:
    rotate = rotate_of(dtype)
    for num_tokens in (1, 2, 8, 33):
        given = inputs(num_tokens, *heads, dim, dtype)
        found = rotate(*given)
        assert_same_bits(found, modeling_llama.apply_rotary_pos_emb(*given))
        assert all(x[0].transpose(0, 1).is_contiguous() for x in found), "as attention reads them"


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_many_tokens_and_broken_numbers(dtype: torch.dtype) -> None:
    q, k, cos, sin = inputs(257, 4, 1, 64, dtype)
    q[0, 1, 3, 5], k[0, 0, 2, 40], q[0, 0, 0, 0] = torch.nan, torch.inf, 3e38
    found, expected = rotate_of(dtype)(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    for ours, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_views_of_one_linear_for_q_k_and_v(dtype: torch.dtype) -> None:
    _, _, cos, sin = inputs(6, 4, 2, 32, dtype)
    qkv = torch.randn(1, 6, 8 * 32).to(dtype)
    q, k = (part.unflatten(-1, (-1, 32)).transpose(1, 2) for part in (qkv[..., : 4 * 32], qkv[..., 4 * 32 : 6 * 32]))
    assert_same_bits(rotate_of(dtype)(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin))


@torch.inference_mode()
def test_what_the_kernel_does_not_serve_goes_to_the_stock_function() -> None:
    own, rotate = modeling_llama.apply_rotary_pos_emb, rotate_of(torch.bfloat16)
    q, k, cos, sin = inputs(4, 4, 2, 32, torch.bfloat16)
    for given in (
        (q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), cos, sin),  # two rows
        (q, k, cos[:, :1], sin[:, :1]),  # one position for all
        (q.float(), k.float(), cos.float(), sin.float()),
        (q, k, cos.float(), sin.float()),
        (q, k, cos.mT.contiguous().mT, sin),
        (q.mT.contiguous().mT, k, cos, sin),
    ):
        assert_same_bits(rotate(*given), own(*given))
    given = (q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert_same_bits(rotate(*given, unsqueeze_dim=2), own(*given, unsqueeze_dim=2))
    assert_same_bits(rotate(*given, 2), own(*given, 2))


@torch.inference_mode()
def test_a_kernel_that_disagrees_is_not_trusted() -> None:
    own, fused = modeling_llama.apply_rotary_pos_emb, rotate_of(torch.bfloat16)
    assert fused_rotary._agrees(own, fused, torch.bfloat16)
    assert not fused_rotary._agrees(modeling_cohere.apply_rotary_pos_emb, fused, torch.bfloat16)
    assert not fused_rotary._agrees(own, lambda q, k, cos, sin: own(q, k, cos, -sin), torch.bfloat16)


class Plain(nn.Module):
    """Calls no rotary function."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_modules_without_the_function_are_left_alone() -> None:
    model = nn.Sequential(Plain(), nn.Linear(4, 4))
    assert fuse_rotary(model) == 0 and type(model[0]) is Plain
