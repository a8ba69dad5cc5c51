"""Files that hold one projection of all experts in one tensor of three dimensions: MLX-LM's, and those whose outer half
is shared by all experts. Judged by the dense weights, a product per expert.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conformance.expert_files import ALPHA, PREFIX, R, _add, _config, _empty, _expert_names, _expert_pairs, _outer
from tests.conformance.making import CONFIG, Adapter, Files, Make, seed_of
from tests.conformance.oracle import DenseOracle
from tests.conformance.traits import Traits

Stacked = dict[str, tuple[Tensor, Tensor]]
"""Projection → A [E, r, in] and B [E, out, r]."""


def shared_outer(traits: Traits, folder: Path) -> Adapter:
    """A of gate and up, and B of down, have one entry for all experts, as what is outside of the experts sees them."""
    tensors: dict[str, Tensor] = {}
    names = _expert_names(traits)

    def write(module: str, pairs: Stacked) -> None:
        for part, (a, b) in pairs.items():
            name = f"{PREFIX}{_outer(traits, module)}.{names[part]}"
            is_down = part == "down"
            tensors[f"{name}.lora_A.weight"] = a if is_down else a[:1].clone()
            tensors[f"{name}.lora_B.weight"] = b[:1].clone() if is_down else b

    oracle = _made(traits, folder, write, shares_outer=True)
    Files(_config(*names.values()), tensors).write(folder)
    return Adapter(folder, oracle)


def mlx(*, in_one_dimension: bool) -> Make:
    """`switch_mlp`; before 2025 A was [E·r, in]."""

    def make(traits: Traits, folder: Path) -> Adapter:
        tensors: dict[str, Tensor] = {}

        def write(module: str, pairs: Stacked) -> None:
            outer = module if traits.architecture == "gpt_oss" else f"{module.removesuffix('experts')}switch_mlp"
            for part, (a, b) in pairs.items():
                tensors[f"{outer}.{part}_proj.lora_a"] = a.reshape(-1, a.shape[2]) if in_one_dimension else a
                tensors[f"{outer}.{part}_proj.lora_b"] = b

        oracle = _made(traits, folder, write, shares_outer=False)
        parameters = {"rank": R, "scale": ALPHA / R, "dropout": 0.0}
        config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "some/base"}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
        return Adapter(folder, oracle)

    return make


def _made(traits: Traits, folder: Path, write: Callable[[str, Stacked], None], *, shares_outer: bool) -> DenseOracle:
    generator = torch.Generator().manual_seed(seed_of(folder))
    deltas: dict[str, Tensor] = {}
    for module in traits.experts:
        gate_up, down = _empty(traits, module)
        each = [_expert_pairs(generator, traits, module) for _ in range(gate_up.shape[0])]
        if shares_outer:
            for pairs in each:
                for part in ("gate", "up"):
                    pairs[part] = each[0][part][0], pairs[part][1]
                pairs["down"] = pairs["down"][0], each[0]["down"][1]
        for expert, pairs in enumerate(each):
            _add(gate_up, down, expert, {part: ALPHA / R * b @ a for part, (a, b) in pairs.items()}, traits)
        write(module, {part: _stack([pairs[part] for pairs in each]) for part in ("gate", "up", "down")})
        deltas[f"{module}.gate_up_proj"], deltas[f"{module}.down_proj"] = gate_up, down
    return DenseOracle(traits.architecture, deltas)


def _stack(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
