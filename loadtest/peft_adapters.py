"""Random LoRA adapters on disk, as PEFT writes them, for a base whose layer shapes are read from its GGUF.

Speed does not depend on what an adapter has learnt, only on its rank and on which linears it targets: rank 16 on all
seven here, float16 on disk. Needs numpy, safetensors and gguf; knows nothing of servers.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from safetensors.numpy import save_file

RANK, ALPHA = 16, 32
_SCALE = 0.02  # of the random weights: small enough that no activation overflows

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Module of a llama decoder layer in transformers → the same in GGUF."""


def linear_shapes(gguf: Path) -> dict[str, tuple[int, int]]:
    """Module name in transformers → (in_features, out_features), of all decoder layers."""
    found = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in GGUFReader(gguf).tensors}
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(sum(name.endswith(".attn_q.weight") for name in found)):
        for module, name in GGUF_NAMES.items():
            in_features, out_features = found[f"blk.{layer}.{name}.weight"]
            shapes[f"model.layers.{layer}.{module}"] = (in_features, out_features)
    return shapes


def write_adapters(folder: Path, shapes: Mapping[str, tuple[int, int]], count: int, *, base: str) -> list[Path]:
    """Write `count` different adapters as folder/a0, folder/a1, …; those already there are kept."""
    folders = [folder / f"a{seed}" for seed in range(count)]
    for seed, each in enumerate(folders):
        if not (each / "adapter_config.json").is_file():
            write_adapter(each, shapes, seed, base)
    return folders


def write_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    seed: int,
    base: str,
    *,
    rank: int = RANK,
    scale: float = _SCALE,
) -> None:
    """One adapter on all linears of `shapes`, alpha twice its rank; `scale` is the deviation of its random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module, (in_features, out_features) in shapes.items():
        prefix = f"base_model.model.{module}"
        for name, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
            values = random.standard_normal(shape, dtype=np.float32) * np.float32(scale)
            tensors[f"{prefix}.{name}.weight"] = values.astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": ALPHA // RANK * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
    }
    # Last, so that a folder with a config is whole.
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
