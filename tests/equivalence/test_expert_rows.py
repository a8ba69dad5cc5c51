"""Base rows of a model with experts keep their bits, wherever other rows' adapters have these routed, and however the
steps are cut: which tokens an expert meets beside a row is not that row's affair."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from adapters import lora_experts
from adapters.adapter_ref import AdapterVersion
from adapters.expert_groups import ExpertGroups
from adapters.lora_model import LoRAModel, LoRAWeights
from tests.conformance.models import build
from tests.equivalence.harness import EngineHarness, Squeeze

HIDDEN, NUM_EXPERTS, VOCAB = 160, 8, 96
OF_EXPERTS: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts_per_tok": 2, "intermediate_size": 88,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**OF_EXPERTS, num_experts=NUM_EXPERTS, moe_intermediate_size=88),
    "mixtral": lambda: hf.MixtralConfig(**OF_EXPERTS, num_local_experts=NUM_EXPERTS, sliding_window=None),
    "gpt_oss": lambda: hf.GptOssConfig(**OF_EXPERTS, num_local_experts=NUM_EXPERTS, sliding_window=8),
}
BUDGETS = {"float32": [64], "bfloat16": [64, 17, 9]}  # tokens a step: only our own dense products let rows be cut anew
NUM_TOKENS = 8


def save(architecture: str, folder: Path) -> Path:
    torch.manual_seed(5)
    model: Any = build(CONFIGS[architecture]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.08)
    model.save_pretrained(folder)
    return folder


def routing(harness: EngineHarness, favourites: tuple[int, int]) -> AdapterVersion:
    """An adapter that sends every token either to these two experts or to none of them, in every layer."""
    base = harness.engine.base
    modules = {}
    for number, (name, shape) in enumerate(base.modules.routers.items()):
        generator = torch.Generator().manual_seed(number)
        a = torch.randn(1, shape.in_features, generator=generator)
        b = torch.full((1, shape.out_features), -20.0)
        b[0, list(favourites)] = 20.0
        modules[name] = LoRAWeights(a.to(base.dtype), b.to(base.dtype))
    version = AdapterVersion("".join(str(i) for i in favourites).ljust(64, "0"))
    harness.engine.load_adapter(LoRAModel(version, modules))
    return version


def prompt(number: int, length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(number)).tolist()


def base_logits(base: Path, dtype: str, budget: int, loads: list[Tensor], *, others: int, is_routed: bool) -> Tensor:
    """[NUM_TOKENS, vocab] of the base row; `loads` then has what experts were given."""
    harness = EngineHarness.open(base, dtype, Squeeze(max_num_batched_tokens=budget, max_num_seqs=8))
    versions = [routing(harness, favourites) for favourites in ((0, 1), (2, 5))]
    harness.add("base", prompt(0, 23), max_tokens=NUM_TOKENS)
    for number in range(others):
        uses = (versions[number % 2],) if is_routed else ()
        harness.add(f"other {number}", prompt(number + 1, 5 + 4 * number), *uses, max_tokens=NUM_TOKENS)
    loads.clear()  # of the trials at load
    harness.run()
    return harness.chosen_logits("base")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of each call of experts, how many rows every expert has."""
    seen: list[Tensor] = []

    class Watched(ExpertGroups):
        @classmethod
        def of(cls, top_k_index: Tensor, num_experts: int) -> ExpertGroups:
            seen.append(torch.bincount(top_k_index.flatten(), minlength=num_experts).float())
            return ExpertGroups.of(top_k_index, num_experts)

    monkeypatch.setattr(lora_experts, "ExpertGroups", Watched)
    return seen


@pytest.mark.parametrize("dtype", BUDGETS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_base_rows_do_not_feel_where_others_are_routed(
    architecture: str, dtype: str, tmp_path: Path, loads: list[Tensor]
) -> None:
    base = save(architecture, tmp_path / architecture)
    plain = base_logits(base, dtype, 64, loads, others=6, is_routed=False)
    loads_plain = torch.stack(loads)  # [num_calls, NUM_EXPERTS]
    for budget in BUDGETS[dtype]:
        found = base_logits(base, dtype, budget, loads, others=6, is_routed=True)
        assert torch.equal(found, plain), budget
        if budget == 64:
            elsewhere = (torch.stack(loads) - loads_plain).abs().sum() / 2
            assert elsewhere > 0.15 * loads_plain.sum(), "the others are routed as they were"
    if len(BUDGETS[dtype]) > 1:
        assert torch.equal(base_logits(base, dtype, 64, loads, others=0, is_routed=False), plain)
