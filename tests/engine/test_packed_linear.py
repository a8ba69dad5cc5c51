"""Packed linears are the plain product, in any company of rows, or they are not packed."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from server.engine import packed_linear
from server.engine.packed_linear import PackedLinear, pack_linears

TOLERANCE = 2e-2


def linear(in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias).to(dtype).requires_grad_(False)


@pytest.fixture
def dtype() -> torch.dtype:
    if not pack_linears(nn.Sequential(linear(8, 8, torch.bfloat16))):
        pytest.skip("oneDNN packs no bfloat16 on this processor")
    return torch.bfloat16


def test_float32_stays_plain() -> None:
    model = nn.Sequential(linear(8, 4, torch.float32))
    assert pack_linears(model) == 0 and type(model[0]) is nn.Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(576, 192), (1536, 576), (33, 7)])
@torch.inference_mode()
def test_is_the_plain_product(dtype: torch.dtype, shape: tuple[int, int], bias: bool) -> None:
    plain = linear(*shape, dtype, bias=bias)
    packed = nn.Sequential(linear(*shape, dtype, bias=bias))
    assert pack_linears(packed) == 1 and isinstance(packed[0], PackedLinear)
    x = torch.randn(1, 50, shape[0]).to(dtype)
    expected = functional.linear(x.float(), plain.weight.float(), plain.bias.float() if bias else None)
    found = packed(x)
    assert found.shape == expected.shape and found.dtype is dtype
    assert float((found.float() - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("shape", [(576, 192), (1536, 576), (576, 1536)])
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    model = nn.Sequential(linear(*shape, dtype))
    pack_linears(model)
    x = torch.randn(64, shape[0]).to(dtype)
    together = model(x)
    for num_rows in (1, 2, 3, 5, 8, 31):
        for begin in range(0, 62, num_rows):
            part = x[begin : begin + num_rows]
            assert torch.equal(model(part), together[begin : begin + num_rows]), (num_rows, begin)
    assert torch.equal(model(x[:1][None]), together[:1][None])


@torch.inference_mode()
def test_a_weight_used_elsewhere_stays_readable(dtype: torch.dtype) -> None:
    embedding, head = nn.Embedding(40, 16).to(dtype).requires_grad_(False), linear(16, 40, dtype, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    assert pack_linears(model) == 1
    assert torch.equal(embedding(torch.tensor([3])), embedding.weight[3:4])
    assert head.weight is embedding.weight


def test_what_cannot_be_packed_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: nn.Linear) -> None:
        return None

    monkeypatch.setattr(packed_linear, "_pack", refuse)
    model = nn.Sequential(linear(8, 4, torch.bfloat16))
    assert pack_linears(model) == 0 and type(model[0]) is nn.Linear


def test_a_product_that_disagrees_is_not_trusted(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = packed_linear._multiply

    def planted(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return multiply(x, packed, bias) * 1.5

    monkeypatch.setattr(packed_linear, "_multiply", planted)
    model = nn.Sequential(linear(8, 4, dtype), linear(8, 4, dtype))
    assert pack_linears(model) == 0
    assert all(type(module) is nn.Linear for module in model)
