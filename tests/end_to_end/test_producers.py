"""Adapters as five programs write them, each from its file through HTTP to tokens, against PEFT or the program's rule.

PEFT, transformers' Trainer and Unsloth's spelling are read as they are; MLX's folder is a twin written by its rule from
the same numbers; loralib's checkpoint goes through `loramux convert`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from server.cli import run
from tests.end_to_end.tiny_world import PROMPT, TARGETS, World, expected, greedy, mlx_folder, peft_folder, tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("producers")
    with tiny_world(root, allowed=tmp_path_factory.getbasetemp()) as made:
        yield made


def test_peft(world: World, tmp_path: Path) -> None:
    folder = peft_folder(world, tmp_path / "peft", 1, use_dora=True, use_rslora=True)
    loaded = world.load("peft", folder)
    assert world.answer("peft") == expected(world, folder)
    assert {"rslora", "dora"} <= set(loaded["report"]["features"])


def test_a_checkpoint_of_transformers_trainer(world: World, tmp_path: Path) -> None:
    model = get_peft_model(world.fresh(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    rows = [{"input_ids": torch.tensor(PROMPT), "labels": torch.tensor(PROMPT)} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=4, save_steps=4, learning_rate=0.5, report_to=[], use_cpu=True
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert (checkpoint / "optimizer.pt").exists()
    world.load("trainer", checkpoint)
    assert world.answer("trainer") == expected(world, checkpoint)


def test_unsloths_spelling(world: World, tmp_path: Path) -> None:
    """A regex of targets, its own mark in auto_mapping, and names that carry the adapter's."""
    folder = peft_folder(
        world,
        tmp_path / "unsloth",
        3,
        target_modules=r"(?:.*?(?:layers|model).*?(?:self_attn|mlp).*?(?:q_proj|up_proj))",
    )
    wanted = expected(world, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    world.load("unsloth", folder)
    assert world.answer("unsloth") == wanted


def test_mlx(world: World, tmp_path: Path) -> None:
    twin = peft_folder(world, tmp_path / "twin", 4)
    world.load("mlx", mlx_folder(twin, tmp_path / "mlx"))
    assert world.answer("mlx") == expected(world, twin)


def test_loralib_through_convert(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """loralib writes no config and no `.weight`; the truth is y = W x + alpha / r · B A x, its published rule."""
    alpha, rank = 12.0, 3
    torch.manual_seed(5)
    merged = world.fresh()
    checkpoint: dict[str, Tensor] = {}
    for name, module in merged.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("q_proj", "v_proj")):
            a, b = 0.3 * torch.randn(rank, module.in_features), 0.3 * torch.randn(module.out_features, rank)
            checkpoint |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
            module.weight.data += alpha / rank * b @ a
    torch.save(checkpoint, tmp_path / "lora.pt")
    out = tmp_path / "converted"
    arguments = ["convert", str(tmp_path / "lora.pt"), str(out), "--format", "loralib", "--alpha", str(alpha)]
    assert run([*arguments, "--model", str(world.model)]) == 0, capsys.readouterr().err
    world.load("loralib", out)
    wanted = greedy(world, merged)
    assert wanted != world.base
    assert world.answer("loralib") == wanted
