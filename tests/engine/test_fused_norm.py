"""Fused norms give the stock norm's bits, up to one rounding, or the stock norm stays."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from server.engine.fused_norm import FusedRMSNorm, NormForm, fuse_norms

NORMS: list[type[Any]] = [LlamaRMSNorm, Qwen3RMSNorm, Llama4TextRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm]
DTYPES = [torch.bfloat16, torch.float32]
DIM = 576


def norm(kind: type[Any], dim: int = DIM, dtype: torch.dtype = torch.bfloat16, eps: float = 1e-5) -> nn.Module:
    module: nn.Module = kind(dim, eps=eps).to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(dim)
    module.weight.copy_(torch.randn(dim, generator=generator) + 0.3)  # type: ignore[operator]
    return module


def pair(kind: type[Any], dim: int = DIM, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, nn.Module]:
    """A stock norm and the same one swapped."""
    stock, fused = norm(kind, dim, dtype), norm(kind, dim, dtype)
    assert fuse_norms(nn.ModuleList([fused])) == 1
    assert isinstance(fused, FusedRMSNorm) and isinstance(fused, kind)
    return stock, fused


def steps_apart(found: Tensor, expected: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between, element by element."""
    places = (x.view(torch.int16).int() for x in (found, expected))
    a, b = (torch.where(place < 0, -32768 - place, place) for place in places)
    return (a - b).abs()


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal but for rare roundings: a step of x̂, which the product with the weight can make two; 1e-6 in float32."""
    assert found.dtype is expected.dtype and found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found[~found.isnan()], expected[~expected.isnan()]
    if found.dtype is torch.bfloat16:
        apart = steps_apart(found, expected)
        assert int(apart.max()) <= 2 and float((apart > 0).float().mean()) < 1e-3
    else:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
@torch.inference_mode()
def test_is_the_stock_norm(kind: type[Any], dtype: torch.dtype) -> None:
    for dim in (DIM, 64, 33):
        stock, fused = pair(kind, dim, dtype)
        for scale in (1e-6, 1e-2, 1.0, 300.0):
            x = (torch.randn(1, 200, dim) * scale + 0.1 * scale).to(dtype)
            assert_close(fused(x), stock(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm])
@torch.inference_mode()
def test_extreme_rows_come_out_as_in_the_stock_norm(kind: type[Any], dtype: torch.dtype) -> None:
    stock, fused = pair(kind, dtype=dtype)
    x = torch.randn(8, DIM)
    x[0] = 0.0
    x[1, 5] = torch.nan
    x[2] *= 1e30  # its squares overflow
    x[3, 7] = torch.inf
    x[4] *= 1e-38
    x[5, 9] = -torch.inf
    x[6] = 3e38
    x = x.to(dtype)
    assert_close(fused(x), stock(x))
    assert fused(x)[1].isnan().all() and not fused(x)[7].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_any_leading_shape_and_any_strides(dtype: torch.dtype) -> None:
    stock, fused = pair(Qwen3RMSNorm, 64, dtype)
    heads = torch.randn(1, 7, 5 * 64).to(dtype).view(1, 7, 5, 64)
    for x in (
        heads,
        heads.transpose(1, 2),
        heads[..., 1:4, :],
        heads[0, 0, 0],
        heads[:, :0],
        heads.expand(3, 7, 5, 64),
    ):
        if x.numel():
            assert_close(fused(x), stock(x))
        assert fused(x).shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    _, fused = pair(LlamaRMSNorm, dtype=dtype)
    x = torch.randn(229, DIM).to(dtype)
    together = fused(x)
    for begin, end in ((0, 1), (1, 9), (9, 41), (41, len(x))):
        assert torch.equal(fused(x[begin:end]), together[begin:end])


@torch.inference_mode()
def test_the_weight_stays_where_it_is() -> None:
    stock, fused = pair(LlamaRMSNorm)
    x = torch.randn(3, DIM).bfloat16()
    for module in (stock, fused):
        module.weight.mul_(2.0)  # type: ignore[operator]
    assert_close(fused(x), stock(x))
    assert list(fused.state_dict()) == ["weight"]


def test_what_the_kernel_does_not_serve_goes_to_the_stock_forward() -> None:
    stock, fused = pair(LlamaRMSNorm)
    x = torch.randn(3, DIM)
    assert torch.equal(fused(x), stock(x)) and fused(x).dtype is torch.float32
    x = x.bfloat16().requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())


class LouderRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Looks like an RMSNorm and is none."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        louder: Tensor = super().forward(hidden_states) * 1.02
        return louder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [LouderRMSNorm, CohereLayerNorm, Qwen3NextRMSNormGated])
@torch.inference_mode()
def test_what_is_no_rms_norm_is_left_alone(kind: type[Any], dtype: torch.dtype) -> None:
    module = norm(kind, dtype=dtype)
    assert fuse_norms(module) == 0 and type(module) is kind


@torch.inference_mode()
def test_what_the_kernel_cannot_read_is_left_alone() -> None:
    with_bias, trained, half = nn.LayerNorm(8), LlamaRMSNorm(8), norm(LlamaRMSNorm, dtype=torch.float16)
    without_weight, no_eps = nn.RMSNorm(8, eps=1e-5, elementwise_affine=False), nn.RMSNorm(8).requires_grad_(False)
    model = nn.ModuleList([with_bias, trained, half, without_weight, no_eps, nn.Linear(8, 8)])
    before = [type(module) for module in model]
    assert fuse_norms(model) == 0 and [type(module) for module in model] == before


@torch.inference_mode()
def test_a_norm_is_swapped_once() -> None:
    _, fused = pair(LlamaRMSNorm)
    assert fuse_norms(fused) == 0


@torch.inference_mode()
def test_a_kernel_that_disagrees_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = NormForm.apply
    monkeypatch.setattr(NormForm, "apply", lambda form, x, weight: apply(form, x, weight) * 1.02)
    module = norm(LlamaRMSNorm)
    assert fuse_norms(module) == 0 and type(module) is LlamaRMSNorm
