"""Every variant that PEFT writes, loaded whole and applied the plain way, against PEFT's own logits."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.base_walk import modules_of
from adapters.checkpoint import CheckpointLimits, LoadedAdapter, load_lora_model
from adapters.errors import AdapterRefused, RefusalCode
from adapters.version_store import VersionStore, base_key
from server.engine.live_weights import LiveWeights
from server.lifecycle.catalogue_records import VersionRecord
from server.lifecycle.catalogue_rows import VersionReader, version_values
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
    assert not [warning for warning in loaded.report.warnings if "there are no tensors" in warning]
    has_copy = name.startswith(("embedding", "head"))  # PEFT saves the base's own beside the pair
    assert [key.endswith("base_layer.weight") for key in loaded.report.dropped] == [True] * has_copy
    assert bool(loaded.model.extras) == (name not in ("plain", "head", "adalora", "vera", "bdlora"))


@pytest.mark.parametrize("name", ["dora_and_bias", "embedding_dora", "saved_head", "tokens", "ia3", "ln_tuning"])
def test_what_is_stored_and_listed_is_what_was_loaded(name: str, tmp_path: Path) -> None:
    model = tiny(tied=False)
    trained(model, VARIANTS[name], tmp_path / "adapter")
    loaded = load(tmp_path / "adapter", model)
    base = modules_of(model)
    store = VersionStore(tmp_path / "store", base_key=base_key(base, torch.float32), fingerprint="the base's print")
    store.put(loaded.model)
    found = store.read(loaded.model.version)
    with torch.no_grad():
        assert torch.equal(applied(model, found)(TOKENS).logits, applied(model, loaded.model)(TOKENS).logits)
    assert found.num_bytes == loaded.model.num_bytes
    report = loaded.report
    record = VersionRecord(
        version=found.version, lora_rank=report.lora_rank, num_bytes=report.num_bytes, modules=(), report=report
    )
    values = version_values(record)
    row = tuple(values[key] for key in ("version", "lora_rank", "num_bytes", "modules", "report", "source"))
    assert VersionReader()(row).report == report  # type: ignore[arg-type]


def test_the_report_names_parts_bytes_gains_and_norms(tmp_path: Path) -> None:
    model = tiny(tied=False)
    config = lora(target_modules=[*QV, "embed_tokens"], use_dora=True, modules_to_save=["norm"])  # how all five end
    trained(model, config, tmp_path)
    loaded = load(tmp_path, model)
    report, extras = loaded.report, loaded.model.extras
    assert report.parts == {"gains": 5, "norms": 5, "embedding_lora": 1}
    assert sum(report.part_bytes.values()) == extras.num_bytes
    pairs = sum(weights.num_bytes for weights in loaded.model.modules.values())
    assert report.num_bytes == extras.num_bytes + pairs
    assert extras.embedding is not None
    assert extras.embedding.lora_a is not None and extras.embedding.lora_b is not None
    delta = extras.embedding.lora_a @ extras.embedding.lora_b
    assert report.delta_norms["embed_tokens"] == pytest.approx(float(delta.norm()), rel=1e-4)
    gains = [extras.gains[f"model.layers.{i}.self_attn.q_proj"] for i in range(2)]
    assert report.gain_ranges["q_proj"] == (float(torch.cat(gains).min()), float(torch.cat(gains).max()))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()


def test_dora_without_the_base_s_weights_is_refused(tmp_path: Path) -> None:
    model = tiny(tied=False)
    trained(model, VARIANTS["dora"], tmp_path)
    with pytest.raises(AdapterRefused) as caught:
        load(tmp_path, model, has_weights=False)
    assert caught.value.reason is RefusalCode.WRONG_BASE and caught.value.feature == "base_weights"
