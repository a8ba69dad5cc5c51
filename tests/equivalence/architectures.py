"""Tiny random models of every architecture the equivalence tests cover, small enough to build in milliseconds.

Weights are drawn wide (std 0.15) so that logits are far apart and adapters matter; windows are shorter than the
prompts so that sliding attention really slides.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from torch import nn

VOCAB = 128
_SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 96,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**_GROUPED),
    "qwen2": lambda: hf.Qwen2Config(**_GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**_GROUPED, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**_GROUPED, sliding_window=8),
    "gemma2": lambda: hf.Gemma2Config(
        **_GROUPED, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, final_logit_softcapping=30.0
    ),
    "phi3": lambda: hf.Phi3Config(**_GROUPED, sliding_window=16),
    "gpt2": lambda: hf.GPT2Config(**_GPT2),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**_GPT2, multi_query=True),
    "starcoder2": lambda: hf.Starcoder2Config(**_GROUPED, sliding_window=8),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SIZE, rotary_pct=0.5),
}


def build(architecture: str) -> nn.Module:
    """A model with reproducible random weights, float32."""
    torch.manual_seed(sum(map(ord, architecture)))
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
            elif "norm" not in name and "ln_" not in name:
                parameter.normal_(std=0.05)
    return model.eval()


def save(architecture: str, folder: Path) -> Path:
    build(architecture).save_pretrained(folder)
    return folder
