"""Tiny random bases on disk, adapters that PEFT made on them, and what PEFT computes with a folder."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

LLAMA = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 80}
PROMPT = torch.arange(3, 35).view(2, 16)


def save_base(folder: Path, kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    config = LlamaConfig(**LLAMA) if kind == "llama" else GPT2Config(**GPT2)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():  # biases and norms too, so that a mistake in them shows
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def save_adapter(
    base: Path, folder: Path, *, safe: bool = True, seed: int = 1, moved: float = 0.05, **config: Any
) -> Path:
    """An adapter PEFT made on `base` and that was "trained": everything trainable has moved, B too."""
    torch.manual_seed(seed)
    model = get_peft_model(load_base(base), LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * moved)
    model.save_pretrained(folder, safe_serialization=safe)
    return folder


@torch.no_grad()
def peft_logits(base: Path, adapter: Path | None) -> Tensor:
    """[2, 16, vocab] of PEFT with the folder on a base of its own, or of the base alone."""
    model = load_base(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    logits = model(PROMPT).logits
    assert isinstance(logits, Tensor)
    return logits


def assert_same_logits(base: Path, source: Path, converted: Path, *, tolerance: float = 1e-5) -> float:
    """PEFT with either folder, each on an untouched base: equal to `tolerance` · scale, and not the base's."""
    wanted, plain, got = peft_logits(base, source), peft_logits(base, None), peft_logits(base, converted)
    scale = float(wanted.abs().max())
    effect, error = float((wanted - plain).abs().max()), float((wanted - got).abs().max())
    assert effect > 1e-2 * scale, "the source changes too little to tell anything"
    assert error <= tolerance * scale, f"off by {error:.2e} at scale {scale:.2e}, effect {effect:.2e}"
    return error / scale
