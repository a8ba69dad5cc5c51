"""The base models that are measured, by their configurations, with random weights; and random adapters for them."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.adapter_extras import AdapterExtras
from adapters.adapter_ref import AdapterVersion
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.module_names import BaseModules
from server.config import ModelConfig
from server.engine.base_model import BaseModel, load_base_model

_LLAMA_3_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
_QWEN3: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
_TINY: Mapping[str, Any] = {
    **_LLAMA_3_8B,
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": _LLAMA_3_8B,
    "qwen3-4b": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "tiny": _TINY,
}
"""Name → config.json, of the shapes published under these names."""


def load(name: str, device: torch.device, max_model_len: int) -> BaseModel:
    """The model with random bfloat16 weights, made where they stay."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**CONFIGS[name], "dtype": "bfloat16"}))
        settings = ModelConfig(dtype="bfloat16", device=str(device), load_format="dummy", max_model_len=max_model_len)
        return load_base_model(Path(folder), name, settings)


def random_adapter(
    base: BaseModules, number: int, lora_rank: int, device: torch.device, *, has_gains: bool = False
) -> LoRAModel:
    """Of `lora_rank` on every linear but the head, with numbers that change outputs but not their size; with the gains
    of DoRA where it `has_gains`."""
    generator = torch.Generator(device=device).manual_seed(number)

    def draw(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device)
        return (values * 0.02).to(torch.bfloat16)

    modules = {
        name: LoRAWeights(draw(lora_rank, shape.in_features), draw(lora_rank, shape.out_features))
        for name, shape in base.linears.items()
        if "head" not in name
    }
    gains = {name: 1 + 0.02 * torch.randn(base.linears[name].out_features) for name in modules} if has_gains else {}
    extras = AdapterExtras(gains=gains)
    return LoRAModel(version=AdapterVersion(f"random-{number}"), modules=modules, extras=extras)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a step must at least read and compute."""

    weight_bytes: int  # of all linears and the head, which every step reads whole
    linear_parameters: int  # of the linears
    head_parameters: int
    kv_bytes_per_token: int
    lora_values_per_rank: int  # A and B of the linears that adapters target

    @classmethod
    def of(cls, base: BaseModel) -> "Sizes":
        linears = {name: shape for name, shape in base.modules.linears.items() if "head" not in name}
        parameters = sum(shape.in_features * shape.out_features for shape in linears.values())
        head = base.vocab_size * int(base.config.get_text_config().hidden_size)
        return cls(
            weight_bytes=2 * (parameters + head),
            linear_parameters=parameters,
            head_parameters=head,
            kv_bytes_per_token=2 * sum(shape.num_values for shape in base.kv_shapes),
            lora_values_per_rank=sum(shape.in_features + shape.out_features for shape in linears.values()),
        )
