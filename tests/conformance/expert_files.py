"""Files in which one linear of the base stands as several, or all experts as one: written by hand, with the dense
weights they stand for as their judge, since PEFT does not read them or reads them wrongly.

With rsLoRA PEFT's own fusion of per-expert files is √2 too large for gate and up: it doubles r and alpha alike.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conformance.making import Adapter, Files, Make, seed_of
from tests.conformance.models import fresh
from tests.conformance.oracle import DenseOracle
from tests.conformance.traits import Traits

R, ALPHA = 4, 8
PREFIX = "base_model.model."
FUSED: dict[str, dict[str, tuple[tuple[str, int], ...]]] = {
    "phi3": {
        "qkv_proj": (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)),
        "gate_up_proj": (("gate_proj", 64), ("up_proj", 64)),
    },
    "gpt2": {"c_attn": (("q_proj", 32), ("k_proj", 32), ("v_proj", 32))},
    "gpt_bigcode": {"c_attn": (("q_proj", 32), ("k_proj", 8), ("v_proj", 8))},
}  # fmt: skip
"""Architecture → linear → its parts with their widths, in the order of its outputs."""


def _config(*targets: str, use_rslora: bool = False) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA, "use_rslora": use_rslora,
        "target_modules": sorted(targets), "bias": "none",
    }  # fmt: skip


def _pair(generator: torch.Generator, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    a = torch.randn(R, in_features, generator=generator) * 0.2
    return a, torch.randn(out_features, R, generator=generator) * 0.05


def split_fused(traits: Traits, folder: Path) -> Adapter:
    """q, k and v apart, as on a base of the same weights that keeps them apart; k is left out in the second layer."""
    generator = torch.Generator().manual_seed(seed_of(folder))
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for linear in traits.linears:
        outer, _, last = linear.rpartition(".")
        rows = []
        for part, width in FUSED[traits.architecture].get(last, ()):
            a, b = _pair(generator, traits.shapes[linear][0], width)
            if part == "k_proj" and ".1." in linear:
                b = torch.zeros_like(b)
            else:
                tensors[f"{PREFIX}{outer}.{part}.lora_A.weight"] = a
                tensors[f"{PREFIX}{outer}.{part}.lora_B.weight"] = b
            rows.append(ALPHA / R * b @ a)
        if rows:
            delta = torch.cat(rows)  # [out, in]
            deltas[f"{linear}.weight"] = delta.T if traits.is_transposed else delta
    Files(_config("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), tensors).write(folder)
    return Adapter(folder, DenseOracle(traits.architecture, deltas))


def each_expert(*, use_rslora: bool) -> Make:
    """Every expert's linears apart, as before transformers 5; the last expert has no gate, and no expert but it."""

    def make(traits: Traits, folder: Path) -> Adapter:
        generator = torch.Generator().manual_seed(seed_of(folder))
        scale = ALPHA / (math.sqrt(R) if use_rslora else R)
        tensors: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        names = _expert_names(traits)
        for module in traits.experts:
            gate_up, down = _empty(traits, module)
            for expert in range(gate_up.shape[0]):
                pairs = _expert_pairs(generator, traits, module)
                if expert == gate_up.shape[0] - 1:
                    del pairs["gate"]
                _write_expert(tensors, _outer(traits, module), expert, names, pairs)
                _add(gate_up, down, expert, {k: scale * b @ a for k, (a, b) in pairs.items()}, traits)
            deltas[f"{module}.gate_up_proj"], deltas[f"{module}.down_proj"] = gate_up, down
        Files(_config(*names.values(), use_rslora=use_rslora), tensors).write(folder)
        return Adapter(folder, DenseOracle(traits.architecture, deltas))

    return make


def _outer(traits: Traits, module: str) -> str:
    return module.replace(".mlp.", ".block_sparse_moe.") if traits.architecture == "mixtral" else module


def _expert_names(traits: Traits) -> dict[str, str]:
    if traits.architecture == "mixtral":
        return {"gate": "w1", "up": "w3", "down": "w2"}
    return {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def _empty(traits: Traits, module: str) -> tuple[Tensor, Tensor]:
    model = fresh(traits.architecture)
    parameters = (model.get_parameter(f"{module}.{name}") for name in ("gate_up_proj", "down_proj"))
    gate_up, down = (torch.zeros_like(parameter) for parameter in parameters)
    return gate_up, down


def _sizes(traits: Traits, module: str) -> tuple[int, int]:
    """hidden, intermediate; gpt_oss stores [E, in, out], the others [E, out, in]."""
    down = fresh(traits.architecture).get_parameter(f"{module}.down_proj")
    rows, columns = down.shape[1:]
    return (columns, rows) if traits.architecture == "gpt_oss" else (rows, columns)


def _expert_pairs(generator: torch.Generator, traits: Traits, module: str) -> dict[str, tuple[Tensor, Tensor]]:
    hidden, intermediate = _sizes(traits, module)
    wide = {"gate": (hidden, intermediate), "up": (hidden, intermediate), "down": (intermediate, hidden)}
    return {name: _pair(generator, *shape) for name, shape in wide.items()}


def _write_expert(
    tensors: dict[str, Tensor], outer: str, expert: int, names: dict[str, str], pairs: dict[str, tuple[Tensor, Tensor]]
) -> None:
    for part, (a, b) in pairs.items():
        tensors[f"{PREFIX}{outer}.{expert}.{names[part]}.lora_A.weight"] = a
        tensors[f"{PREFIX}{outer}.{expert}.{names[part]}.lora_B.weight"] = b


def _add(gate_up: Tensor, down: Tensor, expert: int, deltas: dict[str, Tensor], traits: Traits) -> None:
    """ΔW [out, in] of one expert into the fused parameters; gpt_oss keeps gate and up in turns, in columns."""
    if traits.architecture == "gpt_oss":
        gate_up[expert][:, 1::2] = deltas["up"].T
        if "gate" in deltas:
            gate_up[expert][:, ::2] = deltas["gate"].T
        down[expert] = deltas["down"].T
        return
    half = gate_up.shape[1] // 2
    gate_up[expert][half:] = deltas["up"]
    if "gate" in deltas:
        gate_up[expert][:half] = deltas["gate"]
    down[expert] = deltas["down"]


def grouped_by_expert(files: Files, folder: Path) -> None:
    """B as Unsloth trained it: [out, E, r] instead of PEFT's [out, r, E], and the marker that says so."""
    for name, tensor in files.tensors.items():
        if ".experts." in name and ".lora_B." in name:
            by_rank = tensor.view(tensor.shape[0], R, -1)  # [out, r, E]
            files.tensors[name] = by_rank.transpose(1, 2).reshape(tensor.shape)
    files.config["lora_B_layout"] = "grouped_by_expert"
    files.write(folder)
