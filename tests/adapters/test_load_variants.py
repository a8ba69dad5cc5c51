"""Every variant that PEFT writes, loaded whole and applied the plain way, against PEFT's own logits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.base_walk import modules_of
from adapters.checkpoint import CheckpointLimits, LoadedAdapter, load_lora_model
from server.engine.live_weights import LiveWeights
from tests.adapters.dense import applied

LIMITS = CheckpointLimits(max_lora_rank=64, max_adapter_bytes=1 << 28)
QV = ["q_proj", "v_proj"]
TOKENS = torch.tensor([[3, 17, 95, 2, 64, 7]])


def tiny(*, tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    return model


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": QV, **fields})


VARIANTS: dict[str, PeftConfig] = {
    "plain": lora(),
    "dora": lora(use_dora=True),
    "dora_and_bias": lora(use_dora=True, bias="all"),
    "lora_bias": lora(lora_bias=True),
    "bias_all": lora(bias="all"),
    "bias_lora_only": lora(bias="lora_only"),
    "embedding": lora(target_modules=[*QV, "embed_tokens"]),
    "embedding_dora": lora(target_modules=[*QV, "embed_tokens"], use_dora=True),
    "head": lora(target_modules=[*QV, "lm_head"]),
    "head_dora": lora(target_modules=["lm_head"], use_dora=True),
    "saved_norm": lora(modules_to_save=["norm"]),
    "saved_embedding": lora(modules_to_save=["embed_tokens"]),
    "saved_head": lora(modules_to_save=["lm_head"]),
    "tokens": lora(trainable_token_indices=[90, 5, 33]),
    "bdlora": lora(target_modules=["q_proj", "o_proj"], use_bdlora=None),
    "adalora": AdaLoraConfig(target_modules=QV, init_r=6, target_r=4, lora_alpha=9, total_step=10),
    "vera": VeraConfig(r=8, target_modules=QV, save_projection=True),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ln_tuning": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


def trained(model: Any, config: PeftConfig, folder: Path) -> torch.Tensor:
    """The logits of a PEFT model whose parameters are all moved, and which is saved."""
    peft_model = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    torch.manual_seed(1)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    peft_model.save_pretrained(str(folder))
    with torch.no_grad():
        return peft_model.eval()(TOKENS).logits


def load(folder: Path, model: Any, *, limits: CheckpointLimits = LIMITS, has_weights: bool = True) -> LoadedAdapter:
    weights = LiveWeights(lambda: model, "the base's print") if has_weights else None
    return load_lora_model(folder, modules_of(model), limits=limits, dtype=torch.float32, weights=weights)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_pefts(name: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(tied=tied)
    if tied and name in ("head", "head_dora", "saved_head"):
        pytest.skip("PEFT trains the tied embedding, too, or refuses")
    wanted = trained(model, VARIANTS[name], tmp_path)
    loaded = load(tmp_path, model)
    with torch.no_grad():
        plain, found = model(TOKENS).logits, applied(model, loaded.model)(TOKENS).logits
    assert (wanted - plain).abs().max() > 1e-3 * plain.abs().max()
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    has_copy = name.startswith(("embedding", "head"))  # PEFT saves the base's own beside the pair
    assert [key.endswith("base_layer.weight") for key in loaded.report.dropped] == [True] * has_copy
    assert bool(loaded.model.extras) == (name not in ("plain", "head", "adalora", "vera", "bdlora"))
