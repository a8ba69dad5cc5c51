"""Experts and routers of a whole model: tokens of several adapters and of none in one pass, against changed weights."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters.adapter_extras import ExpertPair, ExpertPairs
from adapters.class_swap import own_forward, swap
from adapters.expert_sites import ExpertsSite, LoRARouter, RouterSite
from adapters.extras_batch import ExtrasBatch
from adapters.lora_batch import LoRABatch
from adapters.lora_experts import bound_experts
from adapters.lora_model import LoRAWeights
from adapters.lora_step import Step
from adapters.staged_extras import StagedExtras
from adapters.step_features import StepFeature
from server.engine import experts
from tests.adapters.test_experts import MODELS, E, H, M, fresh

NUM_TOKENS = 6
ROWS_OF = {0: 0, 1: 8}  # adapter → its first pool row


def pairs(seed: int) -> ExpertPairs:
    generator = torch.Generator().manual_seed(seed)

    def drawn(rank: int, width: int) -> Tensor:
        return 0.2 * torch.randn(E, rank, width, generator=generator)

    return ExpertPairs(ExpertPair(drawn(3, H), drawn(3, 2 * M)), ExpertPair(drawn(2, M), drawn(2, H)))


def router_pair(seed: int) -> LoRAWeights:
    generator = torch.Generator().manual_seed(seed)
    return LoRAWeights(torch.randn(2, H, generator=generator), torch.randn(2, E, generator=generator))


def staged(uses: list[list[tuple[int, float]]]) -> StagedExtras:
    """A step whose tokens have these (adapter, weight)."""
    ranges = [tuple((ROWS_OF[adapter], weight) for adapter, weight in token) for token in uses]
    lora = LoRABatch.build([1] * len(uses), ranges, is_prompt=[False] * len(uses))
    assert lora is not None
    rows = np.arange(len(uses))
    batch = ExtrasBatch.build(lora, rows, lambda start: StepFeature.EXPERTS, lambda start: None)
    assert batch is not None
    return StagedExtras(batch, len(uses), None)


class World:
    """A model with one layer, its experts and router swapped."""

    def __init__(self, name: str) -> None:
        self.name, self.step = name, Step()
        self.model = fresh(MODELS[name])
        named = dict(self.model.named_modules())
        name = next(name for name in named if name.endswith("mlp.experts"))
        assert experts.bind(self.model, [name]) == {name}
        self.experts = named[name]
        self.router = next(m for n, m in named.items() if n.endswith(("mlp.gate", "mlp.router")))
        self.experts_site = ExpertsSite(self.step)
        self.router_site = RouterSite(self.step, self.router, own_forward(self.router))
        bound = bound_experts(self.experts)
        assert bound is not None
        bound.site = self.experts_site
        swap(self.router, LoRARouter, self.router_site)

    def logits(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return found


def merged(name: str, experts: ExpertPairs | None, router: LoRAWeights | None, weight: float = 1.0) -> Any:
    """The model with the deltas in its weights."""
    model = fresh(MODELS[name])
    named = dict(model.named_modules())
    module: Any = next(m for n, m in named.items() if n.endswith("mlp.experts"))
    gate: Any = next(m for n, m in named.items() if n.endswith(("mlp.gate", "mlp.router")))
    with torch.no_grad():
        if experts is not None:
            for parameter, pair in ((module.gate_up_proj, experts.gate_up), (module.down_proj, experts.down)):
                assert pair is not None
                delta = torch.einsum("ero,eri->eoi", pair.b, pair.a)
                parameter += weight * (delta.transpose(1, 2) if module.is_transposed else delta)
        if router is not None:
            gate.weight += weight * (router.lora_b.T @ router.lora_a)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_each_token_has_its_own_adapters(name: str) -> None:
    """Each of six sequences of one token is one row of the step."""
    world = World(name)
    world.experts_site.table.update({ROWS_OF[0]: pairs(0), ROWS_OF[1]: pairs(1)})
    world.router_site.table[ROWS_OF[1]] = router_pair(5)
    ids = torch.tensor([[5, 17, 33, 61, 80, 7]]).T  # [6, 1]: six sequences
    uses = [[], [(0, 1.0)], [(1, 1.0)], [(0, 0.5)], [], [(1, 1.0)]]
    plain = fresh(MODELS[name])
    with torch.inference_mode():
        wanted = [plain(input_ids=ids, use_cache=False).logits[:, 0]]
        for model in (
            merged(name, pairs(0), None),
            merged(name, pairs(1), router_pair(5)),
            merged(name, pairs(0), None, 0.5),
        ):
            wanted.append(model(input_ids=ids, use_cache=False).logits[:, 0])
        world.step.extras = staged(uses)
        ours = world.model(input_ids=ids, use_cache=False).logits[:, 0]
    for token, which in enumerate((0, 1, 2, 3, 0, 2)):
        assert (ours[token] - wanted[which][token]).abs().max() <= 1e-5 * wanted[which].abs().max(), token
        if which:
            assert (ours[token] - wanted[0][token]).abs().max() > 1e-4, token


@pytest.mark.parametrize("name", MODELS)
def test_two_adapters_of_one_token_are_summed_within_each_product(name: str) -> None:
    world = World(name)
    world.experts_site.table.update({ROWS_OF[0]: pairs(0), ROWS_OF[1]: pairs(1)})
    x = torch.randn(2, H, generator=torch.Generator().manual_seed(7))
    index, weights = torch.tensor([[0, 2], [3, 1]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    world.step.extras = staged([[(0, 0.5), (1, -0.25)], [(1, 1.0)]])
    both = fresh(MODELS[name])
    module: Any = next(m for n, m in both.named_modules() if n.endswith("mlp.experts"))
    with torch.inference_mode():
        ours = world.experts(x, index, weights)
        for pair_set, weight in ((pairs(0), 0.5), (pairs(1), -0.25)):
            for parameter, pair in ((module.gate_up_proj, pair_set.gate_up), (module.down_proj, pair_set.down)):
                assert pair is not None
                delta = torch.einsum("ero,eri->eoi", pair.b, pair.a)
                parameter += weight * (delta.transpose(1, 2) if module.is_transposed else delta)
        theirs = module(x, index, weights)
    assert (ours[0] - theirs[0]).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_a_step_without_their_adapters_is_the_models_own(name: str) -> None:
    world, ids = World(name), torch.tensor([[5, 17, 33, 61]])
    with torch.inference_mode():
        plain = fresh(MODELS[name])(input_ids=ids, use_cache=False).logits[0]
    ours = world.logits(ids)
    assert (ours - plain).abs().max() <= 1e-6 * plain.abs().max()
    world.step.extras = staged([[(0, 1.0)]] * 4)
    assert torch.equal(world.logits(ids), ours)  # of nobody's here


def test_a_step_of_other_tokens_is_told() -> None:
    world = World("mixtral")
    world.experts_site.table[ROWS_OF[0]] = pairs(0)
    world.step.extras = staged([[(0, 1.0)]] * 3)
    with pytest.raises(RuntimeError, match="experts met 4 tokens in a step of 3"):
        world.logits(torch.tensor([[5, 17, 33, 61]]))


def test_a_router_of_another_form_is_not_taken() -> None:
    linear = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"Linear does not compute its logits with F\.linear"):
        RouterSite(Step(), linear, lambda x: linear(x))
