"""Folders that PEFT does not write, loaded whole: the same as PEFT's twin of it, or as their own trainer computes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.adapters.dense import applied
from tests.adapters.test_load_variants import TOKENS, load, lora, tiny, trained

PREFIX = "base_model.model."


def write_mlx(folder: Path, tensors: dict[str, Tensor], *, scale: float, kind: str = "lora") -> None:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
    parameters = {"rank": 4, "scale": scale, "dropout": 0.0}
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters, "iters": 600, "model": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def logits(model: Any, folder: Path) -> Tensor:
    with torch.no_grad():
        return applied(model, load(folder, model).model)(TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_folders_are_their_peft_twins(kind: str, tmp_path: Path) -> None:
    model = tiny(tied=False)
    config = lora(target_modules=["q_proj", "down_proj", "lm_head"], use_dora=kind == "dora")
    theirs = trained(model, config, tmp_path / "peft")
    twin: dict[str, Tensor] = {}
    for key, tensor in load_file(tmp_path / "peft" / "adapter_model.safetensors").items():
        module, _, part = key.removeprefix(PREFIX).partition(".lora_")
        if part == "magnitude_vector":
            twin[f"{module}.m"] = tensor
        elif part:
            twin[f"{module}.lora_{part[0].lower()}"] = tensor.T
    write_mlx(tmp_path / "mlx", twin, scale=10 / 4, kind=kind)
    ours = logits(model, tmp_path / "mlx")
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - model(TOKENS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_mlx_adapts_a_tied_head_with_its_embedding(tied: bool, tmp_path: Path) -> None:
    model = tiny(tied=tied)
    lora_a, lora_b = torch.randn(96, 4) * 0.1, torch.randn(4, 16) * 0.1
    tensors = {"model.embed_tokens.lora_a": lora_a, "model.embed_tokens.lora_b": lora_b}
    write_mlx(tmp_path / "mlx", tensors, scale=2.0)
    changed = copy.deepcopy(model)
    changed.model.embed_tokens.weight.data += 2.0 * lora_a @ lora_b  # of a tied model the head's, too
    assert (logits(model, tmp_path / "mlx") - changed(TOKENS).logits).abs().max() <= 1e-5


def test_torchtunes_dora_scales_the_bias(tmp_path: Path) -> None:
    """Its layer is m / ‖W + s B A‖ ⊙ (W x + b + s B A x), where PEFT leaves b outside."""
    model, folder = tiny(tied=False), tmp_path / "adapter"
    trained(model, lora(use_dora=True, target_modules=["v_proj", "o_proj"]), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: config[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")}))
    changed = copy.deepcopy(model)
    for key in [key for key in tensors if key.endswith("magnitude_vector")]:
        stem = key.removesuffix(".lora_magnitude_vector")
        linear = changed.get_submodule(stem.removeprefix(PREFIX))
        weight = linear.weight + 2.5 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        gain = tensors[key] / weight.norm(dim=1)
        linear.weight.data = gain[:, None] * weight
        linear.bias.data *= gain
    assert (logits(model, folder) - changed(TOKENS).logits).abs().max() <= 1e-5
