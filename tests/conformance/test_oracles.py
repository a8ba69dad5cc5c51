"""The judges are judged: where two independent ways to an adapter's logits exist, they agree, and where PEFT is wrong
it is shown to be, so that a release which mends it is noticed.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor

from tests.conformance import dialects
from tests.conformance.batch import prompt_of
from tests.conformance.composed import SumOracle
from tests.conformance.expert_files import ALPHA, R
from tests.conformance.making import Adapter, Files, by_peft, lora
from tests.conformance.models import fresh
from tests.conformance.oracle import BaseOracle, DenseOracle, PeftOracle, forward, last_begin
from tests.conformance.traits import traits
from tests.conformance.variants import VARIANTS
from tests.equivalence.oracle import weighted_logits

IDS = list(prompt_of("judges"))


def made(architecture: str, name: str, folder: Path) -> Adapter:
    return VARIANTS[name].make(traits(architecture), folder / name)


def logits(adapter: Adapter) -> Tensor:
    return adapter.oracle.logits(IDS, len(IDS))


def assert_same(left: Tensor, right: Tensor) -> None:
    assert float((left - right).abs().max()) <= 1e-5 * float(right.abs().max())


def expert_deltas(architecture: str, files: Files, scale: float) -> dict[str, Tensor]:
    """ΔW of fused experts by adapters.md's rule: A's rows expert by expert, B's columns rank by rank."""
    deltas = {}
    for module in traits(architecture).experts:
        for parameter, nesting in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            key = f"base_model.model.{module}{nesting}"
            shape = fresh(architecture).get_parameter(f"{module}.{parameter}").shape  # [E, d1, d2]
            a = files.tensors[f"{key}.lora_A.weight"].view(shape[0], R, -1)
            b = files.tensors[f"{key}.lora_B.weight"].view(-1, R, shape[0]).permute(2, 0, 1)  # [E, out, r]
            delta = scale * b @ a
            deltas[f"{module}.{parameter}"] = delta if delta.shape == shape else delta.transpose(1, 2)
    return deltas


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_fused_experts_are_the_dense_weights_of_the_rule(architecture: str, use_rslora: bool, tmp_path: Path) -> None:
    adapter = made(architecture, "experts_rslora" if use_rslora else "experts", tmp_path)
    files = Files.read(adapter.folder)
    deltas = expert_deltas(architecture, files, ALPHA / (math.sqrt(R) if use_rslora else R))
    others = {name: tensor for name, tensor in files.tensors.items() if ".experts." not in name}
    Files({**files.config, "target_parameters": None}, others).write(tmp_path / "others")
    own = PeftModel.from_pretrained(fresh(architecture), tmp_path / "others").eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, delta in deltas.items():
            own.get_base_model().get_parameter(name).add_(delta)
    assert_same(forward(own, IDS), logits(adapter))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_sum_of_one_is_the_adapter_and_a_sum_of_none_the_base(architecture: str, tmp_path: Path) -> None:
    for name in ("plain", "dora", "rslora"):
        adapter = made(architecture, name, tmp_path)
        assert isinstance(adapter.oracle, PeftOracle)
        assert_same(SumOracle(architecture, ((adapter.oracle, 1.0),)).logits(IDS, 0), logits(adapter))
        nothing = SumOracle(architecture, ((adapter.oracle, 0.0),)).logits(IDS, 0)
        assert_same(nothing, BaseOracle(architecture).logits(IDS, 0))


def test_a_sum_of_plain_adapters_is_pefts_own(tmp_path: Path) -> None:
    base = tmp_path / "base"
    fresh("llama").save_pretrained(base)  # type: ignore[operator]
    adapters = [made("llama", name, tmp_path) for name in ("plain", "rslora")]
    weights = (0.7, -0.4)
    parts = tuple((adapter.oracle, weight) for adapter, weight in zip(adapters, weights, strict=True))
    folders = [(adapter.folder, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    assert_same(SumOracle("llama", parts).logits(IDS, 0), weighted_logits(base, folders, IDS))  # type: ignore[arg-type]


def test_pooled_inputs_are_repeated_columns(tmp_path: Path) -> None:
    """PEFT's own forward of QALoRA, which it offers on quantised linears only."""
    adapter = made("llama", "qalora", tmp_path)
    small = Files.read(adapter.folder).tensors
    name = next(iter(small)).replace("lora_B", "lora_A")
    assert isinstance(adapter.oracle, PeftOracle)
    whole = Files.read(adapter.oracle.folder).tensors
    x = torch.randn(1, 5, whole[name].shape[1])
    layer: Any = SimpleNamespace(
        lora_A={"a": SimpleNamespace(weight=small[name])}, lora_B={"a": SimpleNamespace(weight=torch.eye(R))},
        lora_dropout={"a": None}, scaling={"a": 1.0}, qalora_group_size={"a": dialects.GROUP},
        in_features=x.shape[-1], training=False,
    )  # fmt: skip
    theirs = QALoraLinearVariant.forward(layer, "a", x, torch.zeros(1, 5, R))
    torch.testing.assert_close(theirs, x @ whole[name].T)


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl"])
def test_old_names_on_a_wrapped_model_do_nothing_in_peft_and_the_right_thing_in_transformers(
    architecture: str, tmp_path: Path
) -> None:
    adapter = made(architecture, "text_layout", tmp_path)
    dropped = PeftModel.from_pretrained(fresh(architecture), adapter.folder).eval()  # type: ignore[arg-type]
    assert_same(forward(dropped, IDS), BaseOracle(architecture).logits(IDS, 0))
    loaded: Any = fresh(architecture)
    loaded.load_adapter(str(adapter.folder))
    assert_same(forward(loaded, IDS), logits(adapter))


@pytest.mark.parametrize(("architecture", "is_dropped"), [("gemma2", False), ("starcoder2", False), ("gpt2", True)])
def test_peft_drops_a_tied_head_whose_embedding_has_another_name(
    architecture: str, is_dropped: bool, tmp_path: Path
) -> None:
    adapter = made(architecture, "embed_tied", tmp_path)
    theirs = PeftOracle(architecture, adapter.folder).logits(IDS, 0)
    error = float((theirs - logits(adapter)).abs().max()) / float(theirs.abs().max())
    assert error > 0.01 if is_dropped else error <= 1e-5


def test_an_invocation_counts_from_its_last_place_in_the_prompt(tmp_path: Path) -> None:
    adapter = made("llama", "alora_twice", tmp_path)
    prompt = [5, 20, 21, 9, 50, 20, 21, 8]
    base, own = BaseOracle("llama").logits(prompt, 8), adapter.oracle.logits(prompt, 8)
    assert last_begin(prompt, (20, 21)) == 5
    assert torch.equal(own[:5], base[:5]) and not torch.equal(own[5], base[5])
    generated = adapter.oracle.logits([*prompt, 20, 21], 8)  # what is generated is not searched
    assert_same(generated[:8], own)
    assert last_begin([20], (20, 21)) is None


def test_dense_weights_are_those_of_a_linear(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    adapter = by_peft(lambda t: lora(t, target_modules=["q_proj"]))(traits("llama"), folder)
    tensors = Files.read(folder).tensors
    deltas = {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            parameter = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            deltas[parameter] = 2.0 * tensors[name.replace("lora_A", "lora_B")] @ a
    assert_same(DenseOracle("llama", deltas).logits(IDS, 0), logits(adapter))
