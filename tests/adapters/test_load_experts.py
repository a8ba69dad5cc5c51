"""Adapters of fused experts and of routers, loaded from folders that PEFT wrote or that hold every expert apart: what
they may take, what is refused, what the report says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from adapters.base_walk import modules_of
from adapters.checkpoint import CheckpointLimits, LoadedAdapter, load_lora_model
from adapters.errors import AdapterRefused, RefusalCode
from tests.adapters.test_experts import COMMON, MODELS, E, H, M, experts_of, fresh

LAYER = "base_model.model.model.layers.0.mlp"
LIMITS = CheckpointLimits(max_lora_rank=8, max_adapter_bytes=1 << 20)
R = 4
WIDTHS = {"gate_proj": (H, M), "w1": (H, M), "up_proj": (H, M), "w3": (H, M), "down_proj": (M, H)}


def load(folder: Path, name: str, **settings: Any) -> LoadedAdapter:
    chosen: dict[str, Any] = {"limits": LIMITS, "dtype": torch.float32} | settings
    return load_lora_model(folder, modules_of(fresh(MODELS[name])), **chosen)


def single(*linears: str, rank: int = R, value: float = 1.0) -> dict[str, Tensor]:
    """Pairs of single experts, "0.gate_proj"."""
    tensors = {}
    for linear in linears:
        width, out = WIDTHS[linear.partition(".")[2]]
        tensors[f"{LAYER}.experts.{linear}.lora_A.weight"] = torch.full((rank, width), value, dtype=torch.bfloat16)
        tensors[f"{LAYER}.experts.{linear}.lora_B.weight"] = torch.full((out, rank), value, dtype=torch.bfloat16)
    return tensors


def saved(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": ["q_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder


def refusal_of(folder: Path, **settings: Any) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as refused:
        load(folder, "qwen3_moe", **settings)
    return refused.value


def trained(name: str, folder: Path, *targets: str) -> Any:
    """A PEFT model whose pairs are all moved, and which is saved."""
    config = LoraConfig(r=R, lora_alpha=10, target_modules=[], target_parameters=list(targets))
    model = get_peft_model(fresh(MODELS[name]), config)
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(str(folder))
    return model


def test_what_one_expert_makes_room_for_is_refused_by_shapes(tmp_path: Path) -> None:
    """All experts have room, whose bytes are settled before any is allocated."""
    folder = saved(tmp_path, single("0.gate_proj", "1.up_proj", "1.down_proj"))
    wanted = 4 * E * (2 * R * (H + 2 * M) + R * (M + H))  # float32
    assert load(folder, "qwen3_moe").model.extras.num_bytes == wanted
    assert wanted > sum(file.stat().st_size for file in folder.glob("*.safetensors")), "it is no test of expansion"
    load(folder, "qwen3_moe", limits=CheckpointLimits(max_lora_rank=R, max_adapter_bytes=wanted // 4))
    refused = refusal_of(folder, limits=CheckpointLimits(max_lora_rank=R, max_adapter_bytes=wanted // 4 - 1))
    assert (refused.reason, refused.feature) == (RefusalCode.TOO_LARGE, "experts")
    assert f"{wanted} bytes" in refused.why and str(wanted - 4) in refused.why
    assert f"--max-adapter-bytes {wanted // 4} " in refused.fix


def test_each_projection_obeys_the_rank_limit_and_their_product_may_be_of_twice(tmp_path: Path) -> None:
    folder = saved(tmp_path, single("0.gate_proj", "0.up_proj"))
    exact = CheckpointLimits(max_lora_rank=R, max_adapter_bytes=1 << 20)
    (pairs,) = load(folder, "qwen3_moe", limits=exact).model.extras.experts.values()
    assert pairs.gate_up is not None and pairs.gate_up.a.shape == (E, 2 * R, H)
    refused = refusal_of(folder, limits=CheckpointLimits(max_lora_rank=R - 1, max_adapter_bytes=1 << 20))
    assert (refused.reason, refused.feature) == (RefusalCode.TOO_LARGE, "max_lora_rank")


def test_single_experts_in_bfloat16_are_scaled_in_float32(tmp_path: Path) -> None:
    folder = saved(tmp_path, single("2.gate_proj", "2.down_proj", value=1.1), lora_alpha=R * 1.3)
    (wide,) = load(folder, "qwen3_moe").model.extras.experts.values()
    (narrow,) = load(folder, "qwen3_moe", dtype=torch.bfloat16).model.extras.experts.values()
    for of_wide, of_narrow in ((wide.gate_up, narrow.gate_up), (wide.down, narrow.down)):
        assert of_wide is not None and of_narrow is not None and of_wide.b.any()
        assert torch.equal(of_wide.a.bfloat16(), of_narrow.a) and torch.equal(of_wide.b.bfloat16(), of_narrow.b)


def test_two_spellings_of_one_projection_are_refused(tmp_path: Path) -> None:
    refused = refusal_of(saved(tmp_path, single("0.gate_proj", "0.up_proj") | single("0.w1", value=5.0)))
    assert refused.reason is RefusalCode.AMBIGUOUS_LAYOUT
    assert refused.tensor is not None and refused.tensor.startswith(f"{LAYER}.experts.0.")
    assert "experts.0 (gate)" in refused.why


def stacked(a: tuple[int, ...], b: tuple[int, ...], name: str = "gate_proj") -> dict[str, Tensor]:
    module = f"{LAYER}.experts.{name}"
    return {f"{module}.lora_A.weight": torch.ones(a), f"{module}.lora_B.weight": torch.ones(b)}


def test_either_half_of_a_projection_may_be_shared_by_all_experts(tmp_path: Path) -> None:
    report = load(saved(tmp_path, stacked((1, R, H), (E, M, R))), "qwen3_moe").report
    assert "experts" in report.features
    again = load(saved(tmp_path, stacked((E, R, H), (1, M, R), "w1")), "qwen3_moe").report
    assert (
        again.delta_norms["experts"] == pytest.approx(report.delta_norms["experts"]) and report.delta_norms["experts"]
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((E - 1, R, H), (E, M, R)), ((E, R, H), (E + 1, M, R)), ((E, R + 1, H), (E, M, R)), ((E, R, H + 1), (E, M, R)),
        ((E, H, R), (E, M, R)), ((E, R, H), (E, R, M)), ((E, R, H), (E, M + 1, R)), ((2, R, H), (E, M, R)),
    ],
)  # fmt: skip
def test_stacked_experts_of_another_shape_are_refused(tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    refused = refusal_of(saved(tmp_path, stacked(a, b)))
    assert refused.reason is RefusalCode.SHAPE_MISMATCH and "experts.gate_proj" in (refused.tensor or "")


def test_stacked_and_single_experts_are_not_mixed(tmp_path: Path) -> None:
    both = stacked((E, R, H), (E, M, R)) | single("0.up_proj")
    assert refusal_of(saved(tmp_path, both)).reason is RefusalCode.AMBIGUOUS_LAYOUT
    twice = stacked((E, R, H), (E, M, R)) | stacked((E, R, H), (E, M, R), "w1")
    assert refusal_of(saved(tmp_path, twice)).reason is RefusalCode.AMBIGUOUS_LAYOUT


def test_a_half_of_two_dimensions_beside_one_of_three_is_refused(tmp_path: Path) -> None:
    refused = refusal_of(saved(tmp_path, stacked((R, H), (E, M, R))))
    assert refused.reason is RefusalCode.SHAPE_MISMATCH and "lora_A" in (refused.tensor or "")


def test_an_index_has_one_spelling(tmp_path: Path) -> None:
    name = f"{LAYER}.experts.00.gate_proj"
    odd = {key.replace(f"{LAYER}.experts.0.gate_proj", name): v for key, v in single("0.gate_proj", value=5.0).items()}
    assert len(odd) == 2 and all(key.startswith(name) for key in odd)
    for tensors in (odd, single("0.gate_proj") | odd):
        refused = refusal_of(saved(tmp_path, tensors))
        assert refused.reason in (RefusalCode.KEY_UNMATCHED, RefusalCode.UNSUPPORTED), refused
        assert name in (refused.tensor or ""), refused


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_pefts_experts_are_reported(name: str, tmp_path: Path) -> None:
    model = trained(name, tmp_path, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    report = load(tmp_path, name).report
    wrappers = [module for module in model.modules() if hasattr(module, "parameter_name")]
    squares = [wrapper.get_delta_weight("default").detach().square().sum() for wrapper in wrappers]
    assert len(squares) == 2
    assert report.delta_norms == {"experts": pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)}
    assert report.parts == {"experts": 2}
    assert report.part_bytes == {"experts": 4 * E * R * (H + 2 * M + M + H)} == {"experts": report.num_bytes}
    assert "experts" in report.features and "router" not in report.features
    assert not [warning for warning in report.warnings if "no effect" in warning]


def test_norms_of_experts_are_summed_over_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = saved(tmp_path, single("0.gate_proj") | single("3.down_proj", value=2.0))
    wanted = (R**2 * H * M + (4 * R) ** 2 * H * M) ** 0.5  # of all ones, and of all twos: ΔW is r and 4r everywhere
    for at_once in (1, 1 << 20):
        monkeypatch.setattr("adapters.load_report._AT_ONCE", at_once)
        assert load(folder, "qwen3_moe").report.delta_norms["experts"] == pytest.approx(wanted)


def test_routers_are_reported(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.gate.lora_A.weight": torch.ones(R, H), f"{LAYER}.gate.lora_B.weight": torch.ones(E, R)}
    report = load(saved(tmp_path, tensors, target_modules=["gate"]), "qwen3_moe").report
    assert (report.parts, report.part_bytes) == ({"routers": 1}, {"routers": 4 * R * (H + E)})
    assert "router" in report.features and "experts" not in report.features
    assert report.delta_norms == {"gate": pytest.approx(R * (H * E) ** 0.5)}


def zeroed(tensors: dict[str, Tensor], half: str) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) if f"lora_{half}" in key else value for key, value in tensors.items()}


EMBEDDING = {
    "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(R, 96),
    "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(H, R),
}
LINEAR = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(R, H),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(H, R),
}
NORM = {"base_model.model.model.norm.weight": torch.ones(H)}
ALL = {**single("0.gate_proj", "1.down_proj"), **EMBEDDING, **LINEAR}
NONE = zeroed(zeroed(ALL, "B"), "embedding_B")
IDLE: dict[str, tuple[dict[str, Tensor], bool]] = {
    "experts": (zeroed(single("0.gate_proj"), "B"), True),
    "experts by A": (zeroed(single("0.gate_proj"), "A"), True),
    "embedding": (zeroed(EMBEDDING, "embedding_B"), True),
    "all": (NONE, True),
    "but one expert": (NONE | single("1.down_proj", value=1e-30), False),
    "but the embedding": (NONE | EMBEDDING, False),
    "but a linear": (NONE | LINEAR, False),
    "but a norm": (NONE | NORM, False),
}


@pytest.mark.parametrize("case", IDLE)
def test_an_adapter_that_changes_nothing_is_said_to(case: str, tmp_path: Path) -> None:
    tensors, is_idle = IDLE[case]
    more = {"modules_to_save": ["norm"]} if "norm" in case else {}
    report = load(saved(tmp_path, tensors, **more), "qwen3_moe").report
    assert ("every pair is zero: the adapter has no effect" in report.warnings) == is_idle, report.warnings


def test_experts_whose_change_overflows_are_refused(tmp_path: Path) -> None:
    refused = refusal_of(saved(tmp_path, single("0.gate_proj", value=1e25)))
    assert (refused.reason, refused.tensor) == (RefusalCode.NONFINITE, "experts")


def square() -> PreTrainedModel:
    """down_proj [E, H, H]: no shape tells its inputs from its outputs."""
    return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=E, intermediate_size=H))


def test_square_experts_are_refused_unless_the_file_names_who_wrote_it(tmp_path: Path) -> None:
    config = LoraConfig(r=R, lora_alpha=10, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = get_peft_model(fresh(square), config)
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(str(tmp_path))
    base = modules_of(fresh(square))
    (pairs,) = load_lora_model(tmp_path, base, limits=LIMITS, dtype=torch.float32).model.extras.experts.values()
    assert pairs.down is not None
    delta = torch.einsum("ero,eri->eoi", pairs.down.b, pairs.down.a)
    before = experts_of(fresh(square)).down_proj.detach()
    after = experts_of(model.merge_and_unload()).down_proj.detach()
    torch.testing.assert_close(delta, after - before, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(delta, delta.transpose(1, 2), atol=1e-2), "it is no test of which side is which"
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    del fields["peft_version"]
    path.write_text(json.dumps(fields))
    with pytest.raises(AdapterRefused) as refused:
        load_lora_model(tmp_path, base, limits=LIMITS, dtype=torch.float32)
    assert refused.value.reason is RefusalCode.AMBIGUOUS_LAYOUT and refused.value.fix
