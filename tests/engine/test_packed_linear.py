"""Packed linears are the plain product, in any company of rows, or they are not packed."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.ops import bf16_dot
from adapters.ops.thread_team import ThreadTeam
from server.engine import packed_linear, panel_linear
from server.engine.packed_linear import PackedCount, PackedLinear
from server.engine.panel_linear import PanelLinear

TOLERANCE = 2e-2


def linear(in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias).to(dtype).requires_grad_(False)


def pack_linears(model: nn.Module, *groups: tuple[str, ...]) -> PackedCount:
    return packed_linear.pack_linears(model, groups, ThreadTeam(1))


@pytest.fixture(params=["panels", "onednn"])
def packed_class(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[nn.Linear]:
    """Each of the two products, where this processor has it."""
    if request.param == "onednn":
        monkeypatch.setattr(bf16_dot, "is_supported", lambda: False)
    wanted: type[nn.Linear] = PanelLinear if request.param == "panels" else PackedLinear
    trial = nn.Sequential(linear(8, 32, torch.bfloat16))
    pack_linears(trial)
    if type(trial[0]) is not wanted:
        pytest.skip(f"this processor has no {request.param} product for bfloat16")
    return wanted


def test_float32_stays_plain() -> None:
    model = nn.Sequential(linear(8, 32, torch.float32))
    assert pack_linears(model) == PackedCount(panels=0, onednn=0) and type(model[0]) is nn.Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(576, 192), (1536, 576), (34, 32), (33, 7)])
@torch.inference_mode()
def test_is_the_plain_product(packed_class: type[nn.Linear], shape: tuple[int, int], bias: bool) -> None:
    dtype = torch.bfloat16
    plain = linear(*shape, dtype, bias=bias)
    packed = nn.Sequential(linear(*shape, dtype, bias=bias))
    pack_linears(packed)
    assert type(packed[0]) is (PackedLinear if shape == (33, 7) else packed_class)
    x = torch.randn(1, 50, shape[0]).to(dtype)
    expected = functional.linear(x.float(), plain.weight.float(), plain.bias.float() if bias else None)
    found = packed(x)
    assert found.shape == expected.shape and found.dtype is dtype
    assert float((found.float() - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("shape", [(576, 192), (1536, 576), (576, 1536)])
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_company(packed_class: type[nn.Linear], shape: tuple[int, int]) -> None:
    dtype = torch.bfloat16
    model = nn.Sequential(linear(*shape, dtype))
    pack_linears(model)
    x = torch.randn(64, shape[0]).to(dtype)
    together = model(x)
    for num_rows in (1, 2, 3, 5, 8, 31):
        for begin in range(0, 62, num_rows):
            part = x[begin : begin + num_rows]
            assert torch.equal(model(part), together[begin : begin + num_rows]), (num_rows, begin)
    assert torch.equal(model(x[:1][None]), together[:1][None])


@pytest.mark.parametrize("num_panels", [1, 2, 3, 4, 7, 18])
@torch.inference_mode()
def test_every_number_of_rows_and_panels(packed_class: type[nn.Linear], num_panels: int) -> None:
    """As many panels are taken at once as rows leave registers for, and what is left over in smaller steps."""
    plain = linear(70, 32 * num_panels, torch.bfloat16)
    model = nn.Sequential(linear(70, 32 * num_panels, torch.bfloat16))
    pack_linears(model)
    x = torch.randn(40, 70).bfloat16()
    expected = functional.linear(x.float(), plain.weight.float(), plain.bias.float())
    together = model(x)
    assert float((together.float() - expected).abs().max()) <= 2**-8 * float(expected.abs().max())
    for num_rows in range(1, 41):
        assert torch.equal(model(x[:num_rows]), together[:num_rows]), num_rows
        assert torch.equal(model(x[-num_rows:]), together[-num_rows:]), num_rows


@torch.inference_mode()
def test_an_input_of_another_kind_is_refused(packed_class: type[nn.Linear]) -> None:
    model = nn.Sequential(linear(64, 32, torch.bfloat16))
    pack_linears(model)
    model(torch.randn(3, 64).bfloat16())
    for wrong in (torch.randn(3, 64), torch.randn(3, 32).bfloat16()):
        with pytest.raises(RuntimeError):
            model(wrong)


@torch.inference_mode()
def test_a_weight_used_elsewhere_stays_readable(packed_class: type[nn.Linear]) -> None:
    dtype = torch.bfloat16
    embedding, head = nn.Embedding(64, 16).to(dtype).requires_grad_(False), linear(16, 64, dtype, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    pack_linears(model)
    assert isinstance(head, packed_class)
    assert torch.equal(embedding(torch.tensor([3])), embedding.weight[3:4])
    assert head.weight is embedding.weight


@torch.inference_mode()
def test_linears_that_read_one_input_are_one_product(packed_class: type[nn.Linear]) -> None:
    """The outputs, called in any order, with other inputs between, are those of the linears alone."""
    torch.manual_seed(1)
    alone = nn.ModuleDict({name: linear(64, out, torch.bfloat16) for name, out in (("q", 96), ("k", 32), ("v", 64))})
    grouped = nn.ModuleDict({name: linear(64, out, torch.bfloat16) for name, out in (("q", 96), ("k", 32), ("v", 64))})
    grouped.load_state_dict(alone.state_dict())
    pack_linears(alone)
    pack_linears(grouped, ("q", "k", "v"))
    x, other = torch.randn(1, 5, 64).bfloat16(), torch.randn(1, 2, 64).bfloat16()
    for name, argument in (("q", x), ("k", x), ("v", x), ("q", other), ("k", x), ("q", x), ("q", x), ("v", other)):
        assert torch.equal(grouped[name](argument), alone[name](argument)), name


@torch.inference_mode()
def test_threads_and_strides_change_no_bit(packed_class: type[nn.Linear]) -> None:
    if packed_class is not PanelLinear:
        pytest.skip("oneDNN runs on torch's threads")
    team = ThreadTeam(3)
    model, plain = (nn.Sequential(linear(96, 320, torch.bfloat16)) for _ in range(2))
    packed_linear.pack_linears(model, (), team)
    pack_linears(plain)
    x = torch.randn(40, 2, 96).bfloat16()
    with team.step():
        found = model(x.transpose(0, 1))
    team.close()
    assert torch.equal(found, plain(x.transpose(0, 1).contiguous()))


def test_what_cannot_be_packed_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_dot, "is_supported", lambda: False)
    monkeypatch.setattr(packed_linear, "_pack", lambda _: None)
    model = nn.Sequential(linear(8, 32, torch.bfloat16))
    assert pack_linears(model) == PackedCount(panels=0, onednn=0) and type(model[0]) is nn.Linear


def test_a_product_that_disagrees_is_not_trusted(
    packed_class: type[nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply, pack = packed_linear._multiply, panel_linear._pack

    def planted(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return multiply(x, packed, bias) * 1.5

    monkeypatch.setattr(packed_linear, "_multiply", planted)
    monkeypatch.setattr(panel_linear, "_pack", lambda weight, memory: pack(weight, memory) * 1.5)
    model = nn.Sequential(linear(8, 32, torch.bfloat16), linear(8, 32, torch.bfloat16))
    assert pack_linears(model) == PackedCount(panels=0, onednn=0)
    assert all(type(module) is nn.Linear for module in model)
