"""Adapters as five programs write them, each from its file through HTTP to tokens, against PEFT or the program's rule.

PEFT, transformers' Trainer and Unsloth's spelling are read as they are; MLX's folder is a twin written by its rule from
the same numbers; loralib's checkpoint goes through `loramux convert`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from server.cli import run
from server.config import (
    MIB,
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    HTTPConfig,
    LoRALimits,
    ModelConfig,
    ServerConfig,
)
from tests.end_to_end.in_process import InProcessServer, free_port, in_process, save_tiny_model

PROMPT = [5, 300, 17, 42, 9, 211]
NUM_TOKENS = 16
TARGETS = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class World:
    model: Path
    server: InProcessServer
    base: tuple[int, ...]  # what the base answers

    def fresh(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def answer(self, name: str) -> tuple[int, ...]:
        """The tokens a client of OpenAI's gets."""
        with openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0) as client:
            reply = client.completions.create(
                model=name,
                prompt=PROMPT,
                max_tokens=NUM_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
        found: Any = reply.choices[0]
        return tuple(found.token_ids)

    def load(self, name: str, folder: Path) -> dict[str, Any]:
        reply = httpx.post(
            f"{self.server.url}/v1/adapters?wait=60", json={"name": name, "source": str(folder)}, timeout=90
        )
        assert reply.status_code == 201, reply.text
        loaded: dict[str, Any] = reply.json()
        return loaded


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("producers")
    model = save_tiny_model(root / "model")
    config = ServerConfig(
        engine=EngineConfig(
            model=ModelConfig(model=str(model), dtype="float32", device="cpu"),
            cache=CacheConfig(kv_cache_memory=8 * MIB),
            lora=LoRALimits(lora_memory=8 * MIB, cpu_lora_memory=64 * MIB),
        ),
        adapters=AdapterConfig(state_dir=root / "state", allowed_roots=(tmp_path_factory.getbasetemp(),)),
        http=HTTPConfig(port=free_port()),
        served_model_names=("tiny",),
    )
    with in_process(config) as server:
        made = World(model, server, ())
        yield World(model, server, made.answer("tiny"))
        server.check_integrity()


def randomised(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.25 * torch.randn(parameter.shape)
    return model.eval()


def greedy(world: World, model: nn.Module) -> tuple[int, ...]:
    """By transformers' own forward, from the whole sequence each time, of tokens that have a text."""
    num_tokens = len(AutoTokenizer.from_pretrained(world.model))
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            tokens.append(
                int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1, :num_tokens].argmax())
            )
    return tuple(tokens[len(PROMPT) :])


def peft_folder(world: World, out: Path, seed: int, **settings: Any) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **{"target_modules": TARGETS, **settings})
    randomised(get_peft_model(world.fresh(), config), seed).save_pretrained(out)
    return out


def expected(world: World, folder: Path) -> tuple[int, ...]:
    """PEFT alone on a fresh base; it must not be the base's answer."""
    tokens = greedy(world, PeftModel.from_pretrained(world.fresh(), folder).eval())
    assert tokens != world.base, "the oracle is the base: nothing would be proved"
    return tokens


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
    """MLX stores both matrices the other way round and multiplies by `scale` itself."""
    twin = peft_folder(world, tmp_path / "twin", 4)
    folder = tmp_path / "mlx"
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(twin / "adapter_model.safetensors").items():
        module = name.removeprefix("base_model.model.").removesuffix(".weight")
        ours = module.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        tensors[ours] = tensor.T.contiguous()
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    parameters = {
        "rank": 4,
        "scale": 2.0,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
    }
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    world.load("mlx", folder)
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
