"""Fused experts by our products: what transformers computes, and each token's bits its own, whoever is routed where."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from adapters.adapter_extras import ExpertPair, ExpertPairs
from adapters.base_parts import ExpertsShape
from adapters.expert_groups import ExpertGroups
from adapters.expert_sites import ExpertsPart
from adapters.host_memory import HostMemory
from adapters.lora_experts import FusedExperts, PlainProduct, bound_experts
from adapters.ops import bf16_dot
from adapters.ops.thread_team import start_team
from server.engine import experts
from server.engine.expert_panels import PanelExperts, pack_experts
from tests.adapters.test_experts import MODELS, experts_of, fresh

E, K = 6, 2
SIZES = [(32, 24), (96, 40), (320, 160)]  # hidden and intermediate: outputs that fill panels, and that do not
KINDS = ["qwen3_moe", "mixtral", "gpt_oss"]
DTYPES = [torch.float32, torch.bfloat16]
WAYS = ["plain", pytest.param("panels", marks=pytest.mark.skipif(not bf16_dot.is_supported(), reason="AVX512-BF16"))]


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def module_of(kind: str, hidden: int, intermediate: int, dtype: torch.dtype) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_experts_per_tok": K}
    module: nn.Module
    if kind == "qwen3_moe":
        module = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, num_experts=E, moe_intermediate_size=intermediate))
    elif kind == "mixtral":
        module = MixtralExperts(MixtralConfig(**sizes, num_local_experts=E, intermediate_size=intermediate))
    else:
        module = GptOssExperts(GptOssConfig(**sizes, num_local_experts=E, intermediate_size=intermediate))
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.to(dtype).requires_grad_(False)


def fused(module: Any, way: str, threads: int) -> FusedExperts:
    if way == "plain":
        return FusedExperts(module, PlainProduct(module, "gate_up_proj"), PlainProduct(module, "down_proj"))
    model = nn.Sequential(module)
    plain = fused(module, "plain", threads)
    experts.bind_experts(module, plain)
    assert pack_experts(model, start_team(threads)) == 1
    found = bound_experts(module)
    assert found is not None and found is not plain
    return found


def routed(num_tokens: int, hidden: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices that crowd one expert, and leave others few tokens or none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden, generator=generator)
    favour = torch.tensor([3.0, 1.0, 0.5, 0.2, 0.1, -9.0])
    index = (torch.rand(num_tokens, E, generator=generator) + favour.roll(seed)).topk(K).indices
    return x.to(dtype), index, torch.rand(num_tokens, K, generator=generator).to(dtype)


def pairs_of(shape: ExpertsShape, dtype: torch.dtype, seed: int) -> ExpertPairs:
    generator = torch.Generator().manual_seed(seed)

    def drawn(rank: int, width: int) -> Tensor:
        return (0.2 * torch.randn(E, rank, width, generator=generator)).to(dtype)

    hidden, middle = shape.hidden_size, shape.intermediate_size
    gate_up = ExpertPair(drawn(3, hidden), drawn(3, 2 * middle))
    return ExpertPairs(gate_up, ExpertPair(drawn(5, middle), drawn(5, hidden)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_transformers_computes(
    kind: str, sizes: tuple[int, int], dtype: torch.dtype, way: str, threads: int
) -> None:
    module = module_of(kind, *sizes, dtype)
    truth = module_of(kind, *sizes, torch.float32)
    for parameter, exact in zip(module.parameters(), truth.parameters(), strict=True):
        exact.data = parameter.data.float()
    ours = fused(module, way, threads)
    for num_tokens in (1, 5, 40):
        x, index, weights = routed(num_tokens, sizes[0], dtype, num_tokens)
        with torch.inference_mode():
            wanted = experts.own_loop(truth)(x.float(), index, weights.float())
            found = ours.run(x, index, weights)
        limit = 1e-5 if dtype is torch.float32 else 2e-2
        assert found.dtype is dtype
        assert (found.float() - wanted).abs().max() <= limit * wanted.abs().max()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_s_bits_are_its_own(
    kind: str, sizes: tuple[int, int], dtype: torch.dtype, way: str, threads: int
) -> None:
    """With adapters and without: alone, at any place among others, whoever they are and however many."""
    ours = fused(module_of(kind, *sizes, dtype), way, threads)
    shape = ExpertsShape(E, *sizes)
    one, two = pairs_of(shape, dtype, 11), pairs_of(shape, dtype, 12)
    x, index, weights = routed(6, sizes[0], dtype, 0)

    def parts(at: list[int]) -> list[ExpertsPart]:
        """Of our six tokens at these places the third has an adapter, the fourth two."""
        first, both = torch.tensor([at[2], at[3]]), torch.tensor([at[3]])
        return [ExpertsPart(1.0, one, first), ExpertsPart(0.5, two, both)]

    with torch.inference_mode():
        wanted = ours.run(x, index, weights, parts(list(range(6))))
        assert not torch.equal(wanted, ours.run(x, index, weights))
        for seed, num_others in enumerate((0, 1, 2, 7, 13, 60, 300), 1):
            others = routed(num_others, sizes[0], dtype, seed)
            order = torch.randperm(6 + num_others, generator=torch.Generator().manual_seed(seed))
            at = order.argsort()[:6].tolist()
            together = [torch.cat(both)[order] for both in zip((x, index, weights), others, strict=True)]
            crowd = ExpertsPart(2.0, two, torch.tensor(sorted(set(range(len(order))) - set(at)), dtype=torch.int64))
            found = ours.run(*together, [*parts(at), crowd])
            assert torch.equal(found[at], wanted), f"beside {num_others}"
        for token in (0, 1, 4, 5):
            assert torch.equal(ours.run(x[[token]], index[[token]], weights[[token]])[0], wanted[token])


@pytest.mark.parametrize("way", WAYS)
def test_a_slot_without_an_expert_adds_nothing(way: str, threads: int) -> None:
    ours = fused(module_of("mixtral", 32, 24, torch.float32), way, threads)
    x, index, weights = routed(5, 32, torch.float32, 1)
    emptied = index.clone()
    emptied[:, 1] = E
    emptied[4] = E
    single = ours.run(x, index[:, :1].contiguous(), weights[:, :1].contiguous())
    found = ours.run(x, emptied, weights)
    assert torch.equal(found[:4], single[:4]) and not found[4].any()
    assert not ours.run(x, torch.full_like(index, E), weights).any()


@pytest.mark.skipif(not bf16_dot.is_supported(), reason="AVX512-BF16")
def test_rows_of_another_kind_are_told() -> None:
    weight = torch.randn(2, 64, 32)
    product = PanelExperts(weight, None, start_team(1), HostMemory())
    with pytest.raises(RuntimeError, match=r"x is torch.float32 \(3, 31\), not torch.float32 of 32 features"):
        product(torch.randn(3, 31), ExpertGroups.of(torch.tensor([[0], [1], [1]]), 2))
    assert not PanelExperts.fits(weight[:, :, :31].bfloat16()) and not PanelExperts.fits(weight.half())


@pytest.mark.parametrize("name", MODELS)
def test_transformers_calls_ours_for_what_is_bound_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(MODELS[name])
    module = experts_of(model)
    path = next(path for path, each in model.named_modules() if each is module)
    ids = torch.tensor([[5, 17, 33, 61]])
    with torch.inference_mode():
        stock = model(input_ids=ids).logits
        assert experts.bind(model, [path]) == {path}
        assert module.config._experts_implementation == experts.EXPERTS_NAME
        calls = []
        monkeypatch.setattr(FusedExperts, "__call__", lambda *args: calls.append(1) or FusedExperts.run(*args))
        assert (model(input_ids=ids).logits - stock).abs().max() <= 1e-6 * stock.abs().max() and len(calls) == 1
        del module.__dict__["loramux_experts"]
        assert (model(input_ids=ids).logits - stock).abs().max() <= 1e-6 * stock.abs().max() and len(calls) == 1


def test_experts_that_compute_something_else_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = fresh(MODELS["mixtral"])
    module = experts_of(model)
    path = next(path for path, each in model.named_modules() if each is module)
    before = module.config._experts_implementation
    module.has_bias, module.gate_up_proj_bias, module.down_proj_bias = True, torch.ones(4, 48), torch.ones(4, 32)
    module.config._experts_implementation = "eager"  # which knows of no bias here
    assert experts.bind(model, [path]) == frozenset() and "otherwise than known experts" in caplog.text
    assert module.config._experts_implementation == "eager" != before and bound_experts(module) is None
