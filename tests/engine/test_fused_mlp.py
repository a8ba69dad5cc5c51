"""Gated MLPs: the kernel's way gives the stock numbers, or the module is left alone."""

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig, Qwen2Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from adapters.ops.thread_team import ThreadTeam
from server.engine.fused_mlp import FusedMLP, fuse_mlps

SIZES = {"hidden_size": 64, "intermediate_size": 160, "pad_token_id": 0}


def mlp(kind: type[nn.Module] = LlamaMLP, config: type = LlamaConfig) -> nn.Module:
    torch.manual_seed(0)
    return kind(config(**SIZES)).to(torch.bfloat16).requires_grad_(False).eval()


@pytest.mark.parametrize(("kind", "config"), [(LlamaMLP, LlamaConfig), (Qwen2MLP, Qwen2Config)])
@torch.inference_mode()
def test_gives_the_stock_numbers(kind: type[nn.Module], config: type) -> None:
    stock, fused = mlp(kind, config), nn.ModuleList([mlp(kind, config)])
    assert fuse_mlps(fused, ThreadTeam(1)) == 1 and isinstance(fused[0], FusedMLP) and isinstance(fused[0], kind)
    x = torch.randn(1, 200, 64).mul(torch.logspace(-2, 1.5, 200)[:, None]).bfloat16()
    found, expected = fused[0](x).float(), stock(x).float()
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert (found == expected).float().mean() > 0.97
    assert fuse_mlps(fused, ThreadTeam(1)) == 0


@torch.inference_mode()
def test_broken_numbers_come_out_broken() -> None:
    fused = nn.ModuleList([mlp()])
    fuse_mlps(fused, ThreadTeam(1))
    gate = torch.tensor([float("nan"), 3e38, -3e38, 0.0, -0.0]).bfloat16()
    up = torch.ones(5).bfloat16()
    found = fused[0]._combine(gate, up)  # type: ignore[operator]
    expected = nn.functional.silu(gate) * up
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert fused[0]._combine(torch.ones(1).bfloat16(), torch.tensor([torch.nan]).bfloat16()).isnan()  # type: ignore[operator]


@torch.inference_mode()
def test_threads_change_no_bit() -> None:
    team = ThreadTeam(3)
    alone, shared = nn.ModuleList([mlp()]), nn.ModuleList([mlp()])
    fuse_mlps(alone, ThreadTeam(1))
    fuse_mlps(shared, team)
    x = torch.randn(1, 300, 64).bfloat16()
    with team.step():
        found = shared[0](x)
    team.close()
    assert torch.equal(found, alone[0](x))


def test_other_activations_and_dtypes_are_left_alone() -> None:
    others = nn.ModuleList([mlp(GemmaMLP, GemmaConfig), mlp().float()])
    assert fuse_mlps(others, ThreadTeam(1)) == 0
    assert type(others[0]) is GemmaMLP and type(others[1]) is LlamaMLP


def test_weights_that_hide_the_activation_do_not_deceive_the_trial() -> None:
    """Near 0 silu and gelu are both about x / 2."""
    small = mlp(GemmaMLP, GemmaConfig)
    for parameter in small.parameters():
        parameter.mul_(1e-3)
    assert fuse_mlps(nn.ModuleList([small]), ThreadTeam(1)) == 0


def test_another_formula_is_left_alone() -> None:
    class Scaled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.5

    assert fuse_mlps(nn.ModuleList([mlp(Scaled)]), ThreadTeam(1)) == 0
