"""Swapped linears: PEFT is the oracle of the numbers, torch of what must not change."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adapters import ops
from adapters.adapter_ref import AdapterVersion
from adapters.lora_batch import LoRABatch, RowRanges
from adapters.lora_layers import LoRALayers
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.module_names import BaseModules, LinearShape, linears_of
from adapters.ops import LoRAPools, RowTarget, RowWriter, reference

CPU_OPS = ops.select(torch.device("cpu"))
NUM_ROWS, NUM_TOKENS = 40, 6


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}
CONFIGS: dict[str, list[LoraConfig]] = {
    "llama": [
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 5}),
        LoraConfig(r=16, lora_alpha=8, use_rslora=True, target_modules=["k_proj", "v_proj"], layers_to_transform=[1]),
    ],
    "gpt2": [
        LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
        LoraConfig(r=4, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True),
        LoraConfig(r=5, lora_alpha=20, target_modules=["c_fc"], fan_in_fan_out=True),
    ],
}


def peft_adapter(base: nn.Module, config: LoraConfig, seed: int) -> PeftModel:
    """PEFT around a copy of the base, with B randomised (PEFT starts it at zero)."""
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def lora_model(peft: PeftModel, version: str) -> LoRAModel:
    """What the loader makes of it: B transposed to rank-major, with the scale folded in."""
    modules: dict[str, LoRAWeights] = {}
    for name, module in peft.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            modules[name] = LoRAWeights(a.detach(), (b.detach().T * module.scaling["default"]).contiguous())
    return LoRAModel(AdapterVersion(version), modules)


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


@pytest.mark.parametrize("ops_module", [pytest.param(CPU_OPS, id="cpu"), pytest.param(reference, id="reference")])
@pytest.mark.parametrize("min_segment", [1, NUM_TOKENS + 1, 1000], ids=["segments", "joined segments", "rows"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_mixed_batch_equals_peft_alone(kind: str, min_segment: int, ops_module: Any) -> None:
    base = MODELS[kind]()
    pefts = [peft_adapter(base, config, seed) for seed, config in enumerate(CONFIGS[kind])]
    adapters = [lora_model(peft, str(i)) for i, peft in enumerate(pefts)]
    rows: list[int | None] = [0, None, 1, 1, 2, None, 0]  # the adapter of each sequence
    ids = torch.randint(0, 97, (len(rows), NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    plain = logits(base, ids)
    layers = LoRALayers(base, linears_of(base), num_rows=NUM_ROWS, ops=ops_module)
    starts = [0, 10, 20]
    for start, adapter in zip(starts, adapters, strict=True):
        layers.write(start, adapter)
    layers.check_integrity()
    ranges: list[RowRanges] = [() if i is None else ((starts[i], 1.0),) for i in rows]
    batch = LoRABatch.build([NUM_TOKENS] * len(rows), ranges, min_segment=min_segment)
    with layers.applying(layers.ops.stage(batch)):
        got = logits(base, ids)
    for row, adapter_index in enumerate(rows):
        if adapter_index is None:
            want = plain[row : row + 1]
        else:
            want = logits(pefts[adapter_index], ids[row : row + 1])
            assert (want - plain[row]).abs().max() > 0.01
        torch.testing.assert_close(got[row : row + 1], want, rtol=0, atol=1e-5 * float(want.abs().max().clamp(min=1)))
    assert torch.equal(logits(base, ids), plain)


@pytest.mark.parametrize("kind", MODELS)
def test_composition_equals_peft_with_two_adapters_active(kind: str) -> None:
    base = MODELS[kind]()
    parts = [lora_model(peft_adapter(base, config, seed), str(seed)) for seed, config in enumerate(CONFIGS[kind][:2])]
    both = peft_adapter(base, CONFIGS[kind][0], 0)
    both.add_adapter("second", copy.deepcopy(CONFIGS[kind][1]))
    second = peft_adapter(base, CONFIGS[kind][1], 1).state_dict()
    both.load_state_dict({k.replace("default", "second"): v for k, v in second.items() if "lora_" in k}, strict=False)
    both.base_model.set_adapter(["default", "second"])
    ids = torch.randint(0, 97, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(2))
    want = logits(both, ids)
    layers = LoRALayers(base, linears_of(base), num_rows=NUM_ROWS, ops=CPU_OPS)
    layers.write(0, parts[0])
    layers.write(8, parts[1])
    single = LoRABatch.build([NUM_TOKENS], [((0, 1.0),)], min_segment=1)
    double = LoRABatch.build([NUM_TOKENS], [((0, 1.0), (8, 1.0))], min_segment=1)
    with layers.applying(layers.ops.stage(single)):
        assert (logits(base, ids) - want).abs().max() > 0.01
    with layers.applying(layers.ops.stage(double)):
        torch.testing.assert_close(logits(base, ids), want, rtol=0, atol=1e-5 * float(want.abs().max().clamp(min=1)))


@pytest.mark.parametrize("kind", MODELS)
def test_a_swap_changes_no_name_no_type_and_no_weight(kind: str) -> None:
    base, untouched = MODELS[kind](), MODELS[kind]()
    modules = linears_of(base)
    LoRALayers(base, modules, num_rows=4, ops=CPU_OPS)
    assert list(base.state_dict()) == list(untouched.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), untouched.parameters(), strict=True))
    assert [name for name, _ in base.named_buffers()] == [name for name, _ in untouched.named_buffers()]
    for name in modules.linears:
        module = base.get_submodule(name)
        assert isinstance(module, (nn.Linear, Conv1D)) and type(module).__name__ in {"LoRALinear", "LoRAConv1D"}
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight  # type: ignore[operator]
    assert type(base.get_submodule("lm_head")) is nn.Linear
    assert len({type(base.get_submodule(name)) for name in modules.linears}) == 1


class Net(nn.Module):
    """Two linears in a row: 6 -> 5 -> 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


BASE = BaseModules("net", {"first": LinearShape(6, 5), "second": LinearShape(5, 4)})


def weights(in_features: int, out_features: int, rank: int) -> LoRAWeights:
    return LoRAWeights(torch.randn(rank, in_features), torch.randn(rank, out_features))


def one(rank: int = 2, *, name: str = "first", in_features: int = 6, out_features: int = 5) -> LoRAModel:
    return LoRAModel(AdapterVersion("v"), {name: weights(in_features, out_features, rank)})


def batch_of(counts: list[int], ranges: list[RowRanges]) -> LoRABatch | None:
    return LoRABatch.build(counts, ranges, min_segment=100)


@pytest.fixture
def net() -> Net:
    return Net().requires_grad_(False)


@pytest.fixture
def layers(net: Net) -> LoRALayers:
    return LoRALayers(net, BASE, num_rows=8, ops=CPU_OPS)


def test_the_number_of_tokens_must_be_the_batch_s(net: Net, layers: LoRALayers) -> None:
    layers.write(0, one())
    with (
        layers.applying(layers.ops.stage(batch_of([1, 1], [((0, 1.0),), ()]))),
        pytest.raises(RuntimeError, match="LoRA batch of 2 tokens met x"),
    ):
        net(torch.zeros(1, 3, 6))


def test_applying_refuses_to_nest_and_ends_after_an_error(net: Net, layers: LoRALayers) -> None:
    layers.write(0, one())
    x = torch.randn(1, 6)
    plain = net(x)
    with layers.applying(None), pytest.raises(RuntimeError, match="already being applied"), layers.applying(None):
        pass
    with pytest.raises(ZeroDivisionError), layers.applying(layers.ops.stage(batch_of([1], [((0, 1.0),)]))):
        assert not torch.equal(net(x), plain)
        _ = 1 / 0
    assert torch.equal(net(x), plain)
    with layers.applying(None):
        assert torch.equal(net(x), plain)


@pytest.mark.parametrize(
    ("start", "model", "message"),
    [
        (0, LoRAModel(AdapterVersion("v"), {"first": weights(6, 5, 2), "third": weights(6, 5, 2)}), "targets third"),
        (0, one(in_features=7), "a module of LinearShape"),
        (7, one(), r"rows \[7, 9\) are outside pools of 8 rows"),
        (-1, one(), "outside"),
    ],
)
def test_a_write_that_cannot_be_whole_changes_nothing(
    net: Net, layers: LoRALayers, start: int, model: LoRAModel, message: str
) -> None:
    layers.write(0, one())
    x = torch.randn(1, 6)
    batch = batch_of([1], [((0, 1.0),)])
    with layers.applying(layers.ops.stage(batch)):
        before = net(x)
    with pytest.raises(ValueError, match=message):
        layers.write(start, model)
    with layers.applying(layers.ops.stage(batch)):
        assert torch.equal(net(x), before)
    layers.check_integrity()


def test_a_later_adapter_takes_over_rows_and_leaves_nothing_of_the_earlier(net: Net, layers: LoRALayers) -> None:
    x = torch.randn(1, 6)
    layers.write(0, one(4))
    layers.write(4, one(4, name="second", in_features=5, out_features=4))
    later = one(3)
    layers.write(2, later)  # over the end of the first and the start of the second
    layers.check_integrity()
    assert [layers.version_at(start) for start in (0, 2, 4)] == [None, later.version, None]
    plain = net.second(net.first(x))
    with layers.applying(layers.ops.stage(batch_of([1], [((2, 1.0),)]))):
        got = net(x)
    a, b = later.modules["first"].lora_a, later.modules["first"].lora_b
    torch.testing.assert_close(got, net.second(net.first(x) + x @ a.T @ b))
    with layers.applying(layers.ops.stage(batch_of([1], [((0, 1.0), (4, 1.0))]))):
        assert torch.equal(net(x), plain)
    layers.clear(0, 8)
    layers.check_integrity()
    with layers.applying(layers.ops.stage(batch_of([1], [((2, 1.0),)]))):
        assert torch.equal(net(x), plain)


def test_check_integrity_sees_a_stray_rank(layers: LoRALayers) -> None:
    layers.write(0, one())
    layers._modules["second"].group.pools.ranks[0, 3] = 2
    with pytest.raises(AssertionError, match="second"):
        layers.check_integrity()


def test_a_module_without_adapters_runs_lora_code_only_where_told_to(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class CountingOps:
        def bind(self, pools: LoRAPools) -> Any:
            bound = reference.bind(pools)
            name = "first" if pools.in_features == 6 else "second"

            class Counting:
                def add(self, ys: Sequence[Tensor], x: Tensor, batch: LoRABatch) -> None:
                    calls.append(name)
                    bound.add(ys, x, batch)

            return Counting()

        def row_writer(self, targets: Sequence[RowTarget]) -> RowWriter:
            return reference.row_writer(targets)

        def stage(self, batch: LoRABatch) -> LoRABatch:
            return batch

    layers = LoRALayers(net, BASE, num_rows=8, ops=CountingOps())
    layers.write(0, one())
    x = torch.randn(2, 6)
    with layers.applying(layers.ops.stage(batch_of([2], [()]))):
        net(x)
    assert calls == []
    with layers.applying(layers.ops.stage(batch_of([2], [((0, 1.0),)]))):
        net(x)
    assert calls == ["first"]
    plain = net.second(net.first(x))
    with layers.applying(layers.ops.stage(batch_of([2], [((4, 1.0),)])), everywhere=True):
        assert torch.equal(net(x), plain)
    assert calls == ["first", "first", "second"]
    with layers.applying(layers.ops.stage(batch_of([2], [((0, 1.0),)]))):
        net(x)
    assert calls == ["first", "first", "second", "first"], "everywhere outlived its step"
    with layers.applying(None, everywhere=True):
        net(x)
    assert len(calls) == 4, "a step of base rows only has nothing to apply"


def test_clearing_reads_nothing_from_the_device(layers: LoRALayers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read would wait for all that the device has been given to do."""
    layers.write(0, one())
    for method in ("item", "tolist", "__int__", "__bool__"):
        monkeypatch.setattr(Tensor, method, lambda self, name=method: pytest.fail(f"{name} waits for the device"))
    layers.clear(0, 8)
    monkeypatch.undo()
    layers.check_integrity()
    assert not any(group.targeted for group in layers._groups)


def test_a_forward_hung_on_the_instance_stays_in_charge(net: Net) -> None:
    original = net.first.forward
    net.first.forward = lambda x: original(x) + 1  # type: ignore[method-assign]
    x = torch.randn(1, 6)
    plain = net(x)
    layers = LoRALayers(net, BASE, num_rows=8, ops=CPU_OPS)
    assert torch.equal(net(x), plain)
    model = one()
    layers.write(0, model)
    a, b = model.modules["first"].lora_a, model.modules["first"].lora_b
    with layers.applying(layers.ops.stage(batch_of([1], [((0, 1.0),)]))):
        got = net(x)
    torch.testing.assert_close(got, net.second(original(x) + 1 + x @ a.T @ b))


def test_a_model_is_swapped_once_and_whole_or_not_at_all(net: Net) -> None:
    wrong = BaseModules("net", {"first": LinearShape(6, 5), "second": LinearShape(5, 5)})
    with pytest.raises(ValueError, match="second has a weight"):
        LoRALayers(net, wrong, num_rows=8, ops=CPU_OPS)
    net.second.half()
    with pytest.raises(ValueError, match="float16"):
        LoRALayers(net, BASE, num_rows=8, ops=CPU_OPS)
    assert type(net.first) is nn.Linear
    net.second.float()
    LoRALayers(net, BASE, num_rows=8, ops=CPU_OPS)
    with pytest.raises(ValueError, match="first has LoRA layers already"):
        LoRALayers(net, BASE, num_rows=8, ops=CPU_OPS)
    with pytest.raises(ValueError, match="0 rows"):
        LoRALayers(Net(), BASE, num_rows=0, ops=CPU_OPS)


def test_bytes_per_row_are_those_of_the_pools(layers: LoRALayers) -> None:
    pools = [pool for group in layers._groups for pool in (group.pools.a_pool, *group.pools.b_pools)]
    num_bytes = sum(pool.numel() * pool.element_size() for pool in pools)
    assert layers.bytes_per_row(BASE, torch.float32) * 8 == num_bytes
    assert layers.bytes_per_row(BASE, torch.bfloat16) * 16 == num_bytes
