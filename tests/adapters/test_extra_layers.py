"""Adapters that change more than linears' low-rank deltas: the oracle is the base's own code on other weights."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from adapters import ops
from adapters.adapter_extras import AdapterExtras, ExpertPairs
from adapters.adapter_ref import AdapterVersion
from adapters.base_parts import NormShape
from adapters.lora_batch import LoRABatch, RowRanges
from adapters.lora_layers import LoRALayers
from adapters.lora_model import LoRAModel
from adapters.module_names import BaseModules
from adapters.norm_sites import norms_of
from adapters.step_features import NO_FEATURES, StepFeature
from tests.adapters.drawn_extras import KINDS, Draw, oracle, parts_of, plain, untied
from tests.equivalence.architectures import VOCAB, build

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox")
NUM_TOKENS, SPACING = 5, 16


def tied(architecture: str) -> nn.Module:
    """Llama has a head of its own, gpt2 and gemma2 are tied."""
    model = build(architecture).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:  # drawn, since ones hide an offset
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3
    return model


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


class World:
    """A base with adapters in its layers, sequences of NUM_TOKENS."""

    def __init__(self, architecture: str, adapters: Sequence[LoRAModel] = (), kinds: Sequence[str] = ()) -> None:
        self.stock = tied(architecture)
        self.base = parts_of(self.stock)
        drawn = [KINDS[kind](Draw(self.stock, self.base, seed)) for seed, kind in enumerate(kinds)]
        self.adapters = [*adapters, *drawn]
        self.model = copy.deepcopy(self.stock)
        num_rows = SPACING * (len(self.adapters) + 1)
        self.layers = LoRALayers(self.model, self.base, num_rows=num_rows, ops=ops.select(torch.device("cpu")))
        for number, adapter in enumerate(self.adapters):
            extras = self.layers.applied(adapter) if number % 2 else None  # it is asked for them, or asks itself
            self.layers.write(SPACING * number, adapter, extras)
        self.layers.check_integrity()

    def run(self, ids: Tensor, uses: Sequence[Sequence[tuple[int, float]]], *, rows: bool = False) -> Tensor:
        """Logits [len(uses), NUM_TOKENS, columns], sequence i with the adapters uses[i] (number, weight)."""
        ranges: list[RowRanges] = [tuple((SPACING * number, weight) for number, weight in row) for row in uses]
        lora = LoRABatch.build([ids.shape[1]] * len(uses), ranges, min_segment=1000 if rows else 1)
        extras = self.layers.extras.batch_of(lora, ids.flatten().numpy(), np.arange(ids.numel()))
        ids = torch.where(ids < VOCAB, ids, 0)
        if lora is None:
            return logits(self.model, ids)
        staged = None if extras is None else self.layers.extras.stage(extras, lora)
        with self.layers.applying(self.layers.ops.stage(lora), extras=staged):
            return logits(self.model, ids)

    def want(self, ids: Tensor, uses: Sequence[tuple[int, float]]) -> Tensor:
        """Logits [1, NUM_TOKENS, columns] of one sequence [1, NUM_TOKENS]."""
        return logits(oracle(self.stock, self.base, [(self.adapters[i], weight) for i, weight in uses]), ids)


def some_ids(num_rows: int, *, num_ids: int = VOCAB, seed: int = 1) -> Tensor:
    return torch.randint(0, num_ids, (num_rows, NUM_TOKENS), generator=torch.Generator().manual_seed(seed))


def assert_equal(got: Tensor, want: Tensor) -> None:
    """Columns that only other rows have are not looked at."""
    columns = min(got.shape[-1], want.shape[-1])
    limit = 1e-5 * float(want.abs().max().clamp(min=1))
    torch.testing.assert_close(got[..., :columns], want[..., :columns], rtol=0, atol=limit)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [False, True], ids=["prompts", "decode rows"])
def test_every_kind_is_a_row_of_one_batch_in_any_order(architecture: str, rows: bool) -> None:
    world = World(architecture, kinds=list(KINDS))
    uses: list[list[tuple[int, float]]] = [[(i, 1.0)] for i in range(len(KINDS))] + [[]]
    ids = some_ids(len(uses))
    wider = list(KINDS).index("wider"), list(KINDS).index("new_rows")
    ids[wider, 1] = VOCAB + 3  # an id that the base does not have
    ids[list(KINDS).index("narrower")] = ids[list(KINDS).index("narrower")].clamp(max=VOCAB - 8)
    order = torch.randperm(len(uses), generator=torch.Generator().manual_seed(7)).tolist()
    got = world.run(ids, uses, rows=rows)
    again = world.run(ids[order], [uses[i] for i in order], rows=rows)
    base = logits(untied(world.stock, world.base), torch.where(ids < VOCAB, ids, 0))
    for i, use in enumerate(uses):
        want = world.want(ids[i : i + 1], use)
        assert_equal(got[i : i + 1], want)
        assert_equal(again[order.index(i)], want[0])
        if use:
            columns = min(base.shape[-1], want.shape[-1])
            assert (want[0, :, :columns] - base[i, :, :columns]).abs().max() > 0.01, list(KINDS)[i]
    assert not got[-1, :, VOCAB:].any()
    alone = logits(world.stock, ids[-1:])
    assert torch.equal(logits(world.model, ids[-1:]), alone), "a step without adapters"
    base_rows = world.run(ids[[0, -1, -1]], [[(0, 1.0)], [], []])[1:]
    with_extras = world.run(ids[[1, -1, -1]], [[(1, 1.0)], [], []])[1:]
    assert torch.equal(base_rows, with_extras), "extras of other rows change a base row"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_and_several_adapters_add_up(architecture: str) -> None:
    kinds = ["dora", "dora_and_bias", "norms", "embedding_lora", "head_lora", "full_copies", "plain", "ia3"]
    world = World(architecture, kinds=kinds)
    uses = [
        [(0, 0.5)], [(0, 0.7), (1, 0.3)], [(2, -0.5)], [(2, 0.5), (3, 1.5)], [(4, 0.25), (5, 0.5)],
        [(3, 1.0), (4, 1.0)], [(6, 1.0), (0, 1.0)], [(7, 0.5), (1, 1.0)], [(5, 0.3)], [],
        [(0, 0.2), (1, 0.3), (2, 0.4), (3, 0.5), (4, 0.6), (6, 0.7), (7, 0.8)],
    ]  # fmt: skip
    ids = some_ids(len(uses))
    got = world.run(ids, uses)
    for i, use in enumerate(uses):
        assert_equal(got[i : i + 1], world.want(ids[i : i + 1], use))
        backwards = world.run(ids[i : i + 1], [use[::-1]])
        assert_equal(backwards, got[i : i + 1])


def test_a_norm_whose_weight_is_nought_is_computed_anew() -> None:
    world = World("llama")
    norm: Any = world.stock.get_submodule("model.norm")
    for model in (world.stock, world.model):
        model.get_submodule("model.norm").weight[3] = 0
    new = {"model.norm.weight": torch.randn(norm.weight.shape)}
    adapter = LoRAModel(AdapterVersion("anew"), {}, extras=AdapterExtras(norms=new, replaced=frozenset(new)))
    applied = world.layers.applied(adapter)
    assert applied is not None and applied.features == StepFeature.EXACT_NORM
    world.adapters = [adapter]
    world.layers.write(0, adapter, applied)
    ids = some_ids(3)
    got = world.run(ids, [[(0, 1.0)], [], [(0, 0.5)]])
    for i, weight in ((0, 1.0), (2, 0.5)):
        assert_equal(got[i : i + 1], world.want(ids[i : i + 1], [(0, weight)]))
    assert torch.equal(got[1:2], world.run(ids, [[], [], []])[1:2])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_cleared_or_written_over_leaves_nothing(architecture: str) -> None:
    world = World(architecture, kinds=list(KINDS))
    ids = some_ids(1)
    assert world.layers.extras.features_at(SPACING) != NO_FEATURES
    other = plain(Draw(world.stock, world.base, 99))
    for number in range(len(KINDS)):
        world.layers.write(SPACING * number, other, world.layers.applied(other))
    world.layers.check_integrity()
    assert not world.layers.extras.starts
    world.adapters[3] = other
    assert_equal(world.run(ids, [[(3, 1.0)]]), world.want(ids, [(3, 1.0)]))
    world.layers.clear(0, world.layers.num_rows)
    world.layers.check_integrity()
    assert torch.equal(world.run(ids, [[(3, 1.0)]]), logits(world.stock, ids))


def test_an_adapter_without_pairs_takes_one_row_and_a_head_s_pair_none() -> None:
    world = World("llama")
    draws = Draw(world.stock, world.base, 0)
    assert [world.layers.sizes.need_of(KINDS[kind](draws)).num_rows for kind in ("ia3", "head_bias", "head_lora")] == [
        1,
        1,
        4,
    ]
    with_head = parts_of(world.stock)
    assert with_head.head is not None
    listed = dict(with_head.linears) | {with_head.head.name: with_head.linears[next(iter(with_head.linears))]}
    both = BaseModules("llama", listed, head=with_head.head)
    assert LoRALayers.bytes_per_row(both, torch.float32) == LoRALayers.bytes_per_row(with_head, torch.float32)


def test_a_step_without_extras_calls_what_it_called_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras of other adapters, resident but not in the step, cost nothing: no operation sees them."""
    calls: list[str] = []
    for name in ("affine", "lora"):
        owner: Any = __import__(f"adapters.ops.cpu{'_affine' if name == 'affine' else ''}", fromlist=["x"])
        bound: Any = owner.CPUAffine if name == "affine" else owner.CPULoRA
        method = "apply" if name == "affine" else "add"
        real = getattr(bound, method)
        monkeypatch.setattr(
            bound, method, lambda self, *args, real=real, name=name: (calls.append(name), real(self, *args))[1]
        )
    monkeypatch.setattr("adapters.lora_head.host_call", lambda *_: calls.append("hosted"))
    monkeypatch.setattr("adapters.lora_embedding.host_call", lambda *_: calls.append("hosted"))
    alone, world = World("llama", kinds=["plain"]), World("llama", kinds=["plain", *KINDS])
    ids = some_ids(2)
    alone.run(ids, [[(0, 1.0)], []])
    expected, calls[:] = list(calls), []
    assert expected and set(expected) == {"lora"}
    world.run(ids, [[(0, 1.0)], []])
    assert calls == expected
    calls.clear()
    world.run(ids, [[], []])
    assert calls == []
    world = World("llama", kinds=["norms"])
    world.run(ids, [[(0, 1.0)], []])
    assert calls.count("affine") == len(world.base.norms), "linears without vectors are left alone"


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"gains": {"nowhere": torch.ones(4)}}, "nowhere, which is not a linear"),
        ({"gains": {"model.layers.0.self_attn.q_proj": torch.ones(4)}}, "another length"),
        ({"input_scales": {"model.layers.0.self_attn.q_proj": torch.ones(4)}}, "scales 4 inputs"),
        ({"norms": {"model.layers.0.weight": torch.ones(4)}}, "not a norm of the base"),
        ({"norms": {"model.norm.weight": torch.ones(4)}}, "met"),
        ({"norms": {"model.norm.bias": torch.ones(48)}}, "has no bias"),
        ({"experts": {"model.layers.0.mlp.experts": ExpertPairs()}, "replaced": frozenset("x")}, "experts"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(extras: dict[str, Any], message: str) -> None:
    world = World("llama")
    with pytest.raises(ValueError, match=message):
        world.layers.applied(LoRAModel(AdapterVersion("v"), {}, extras=AdapterExtras(**extras)))


def test_tokens_that_are_not_the_step_s_are_refused() -> None:
    world = World("llama", kinds=["embedding_rows", "head_bias"])
    for number, message in ((0, "were looked up"), (1, "the head met")):
        lora = LoRABatch.build([3], [((SPACING * number, 1.0),)])
        extras = world.layers.extras.batch_of(lora, np.zeros(3, np.int64), np.arange(3))
        assert lora is not None and extras is not None
        staged = world.layers.extras.stage(extras, lora)
        site = world.model.get_submodule("model.embed_tokens" if number == 0 else "lm_head")
        x = torch.zeros(1, 4, dtype=torch.int64) if number == 0 else torch.zeros(1, 4, 48)
        with (
            world.layers.applying(world.layers.ops.stage(lora), extras=staged),
            torch.inference_mode(),
            pytest.raises(RuntimeError, match=message),
        ):
            site(x)


SHARED = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 48, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
NORMED: dict[str, tuple[hf.PreTrainedConfig, int, float]] = {  # config, norms, offset
    "gemma3": (hf.Gemma3TextConfig(**SHARED, **HEADS, head_dim=8), 7, 1.0),
    "olmo2": (hf.Olmo2Config(**SHARED, **HEADS), 5, 0.0),
    "cohere": (hf.CohereConfig(**SHARED, **HEADS, use_qk_norm=True), 4, 0.0),
    "phi": (hf.PhiConfig(**SHARED, **HEADS, qk_layernorm=True), 4, 0.0),
    "opt": (
        hf.OPTConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, ffn_dim=48, num_attention_heads=4),
        3,
        0.0,
    ),
    "mixtral": (hf.MixtralConfig(**SHARED, **HEADS, num_local_experts=2), 3, 0.0),
    "gpt_oss": (hf.GptOssConfig(**SHARED, **HEADS, head_dim=8, num_local_experts=2), 3, 0.0),
}


@pytest.mark.parametrize("architecture", NORMED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_norms_are_found_by_what_they_do(architecture: str, device: str) -> None:
    config, count, offset = NORMED[architecture]
    with torch.device(device):
        model = hf.AutoModelForCausalLM.from_config(config)
    found = norms_of(model)
    assert len(found) == count and {shape.offset for shape in found.values()} == {offset}
    assert all("norm" in name for name in found)


def test_what_is_not_affine_in_its_parameters_is_no_norm() -> None:
    class Squared(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) ** 2

    class Shifted(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).roll(1, -1)

    modules = [Squared(8), Shifted(8), nn.Linear(8, 8), nn.Embedding(8, 8), nn.PReLU(8), nn.BatchNorm1d(8)]
    model = nn.Sequential(*modules, nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6))
    assert dict(norms_of(model)) == {"6": NormShape((8,), 0.0, True), "7": NormShape((8,))}
