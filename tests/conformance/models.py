"""Tiny random models of every architecture of the conformance table, each made in milliseconds and always alike.

Weights are drawn wide, so that logits lie far apart and an adapter matters; no norm is 1 and no bias 0, so that one
that is forgotten shows. Windows are shorter than the prompts. Knows nothing of adapters.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCAB = 96
_SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_SIZE, "num_key_value_heads": 2}
_WIDE_HEADS: dict[str, Any] = {**_GROUPED, "head_dim": 16}
_OF_EXPERTS: dict[str, Any] = {**_GROUPED, "num_experts_per_tok": 2}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 64,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ROPE: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [1, 1, 2],
}  # heads of 8: halves of 4
_TEXT: dict[str, Any] = {**_GROUPED, "rope_parameters": _ROPE}
_VISION_TOKENS: dict[str, Any] = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}


def _qwen2_vl() -> hf.PreTrainedConfig:
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32, "patch_size": 4}
    return hf.Qwen2VLConfig(text_config=_TEXT, vision_config=vision, **_VISION_TOKENS)


def _qwen2_5_vl() -> hf.PreTrainedConfig:
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    return hf.Qwen2_5_VLConfig(text_config=_TEXT, vision_config=vision, **_VISION_TOKENS)


def _gemma3_vl() -> hf.PreTrainedConfig:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    return hf.Gemma3Config(text_config=_gemma3().to_dict(), vision_config=vision, mm_tokens_per_image=4)


def _llava() -> hf.PreTrainedConfig:
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 16}  # fmt: skip
    return hf.LlavaConfig(text_config=hf.LlamaConfig(**_GROUPED), vision_config=vision, image_token_id=90)


def _gemma3() -> hf.PreTrainedConfig:
    return hf.Gemma3TextConfig(
        **_WIDE_HEADS, sliding_window=8, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"]
    )


CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**_GROUPED),
    "mistral": lambda: hf.MistralConfig(**_GROUPED, sliding_window=8),
    "qwen2": lambda: hf.Qwen2Config(**_GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**_WIDE_HEADS),
    "olmo2": lambda: hf.Olmo2Config(**_GROUPED),
    "cohere": lambda: hf.CohereConfig(**_GROUPED, logit_scale=0.25),
    "gemma": lambda: hf.GemmaConfig(**_WIDE_HEADS),
    "gemma2": lambda: hf.Gemma2Config(
        **_WIDE_HEADS, sliding_window=8, query_pre_attn_scalar=16, final_logit_softcapping=30.0
    ),
    "gemma3": _gemma3,
    "phi": lambda: hf.PhiConfig(**_SIZE, partial_rotary_factor=0.5),
    "phi3": lambda: hf.Phi3Config(**_GROUPED, sliding_window=16),
    "gpt2": lambda: hf.GPT2Config(**_GPT2),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**_GPT2, multi_query=True),
    "starcoder2": lambda: hf.Starcoder2Config(**_GROUPED, sliding_window=8),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SIZE, rotary_pct=0.5),
    "opt": lambda: hf.OPTConfig(**{**_SIZE, "ffn_dim": 64}, word_embed_proj_dim=32),
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3_vl": _gemma3_vl,
    "llava": _llava,
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **_OF_EXPERTS, head_dim=16, num_experts=4, moe_intermediate_size=24, decoder_sparse_step=1
    ),
    "mixtral": lambda: hf.MixtralConfig(**_OF_EXPERTS, num_local_experts=4, sliding_window=None),
    "gpt_oss": lambda: hf.GptOssConfig(**_OF_EXPERTS, head_dim=16, num_local_experts=4, sliding_window=8),
}
"""Architecture → its config, made anew. The keys are the columns of the table in docs/adapters.md."""

REFUSED_BASES: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "falcon": lambda: hf.FalconConfig(
        **{**_SIZE, "ffn_hidden_size": 64}, bias=True, new_decoder_architecture=False, multi_query=True
    ),
}
"""Models that the server does not take, since transformers computes their attention without its attention interface."""


def build(config: hf.PreTrainedConfig) -> nn.Module:
    """By the class that a server would take: a causal LM, or what has one inside."""
    known = type(config) in hf.AutoModelForCausalLM._model_mapping
    kind = hf.AutoModelForCausalLM if known else hf.AutoModelForImageTextToText
    model: nn.Module = kind.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return model


def fresh(architecture: str) -> nn.Module:
    """A model of its own with the architecture's weights, float32, in inference mode."""
    torch.manual_seed(sum(map(ord, architecture)))
    model = build({**CONFIGS, **REFUSED_BASES}[architecture]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
            elif _is_norm(name) and name.endswith("weight"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def _is_norm(parameter: str) -> bool:
    owner = parameter.rpartition(".")[0].rpartition(".")[2].lower()
    return "norm" in owner or owner.startswith("ln_")


def save(architecture: str, folder: Path) -> Path:
    fresh(architecture).save_pretrained(folder)
    return folder
