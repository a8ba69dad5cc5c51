"""A server on a tiny model in this process, adapters that PEFT makes for it, and what PEFT alone answers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

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


@contextmanager
def tiny_world(root: Path, *, allowed: Path) -> Iterator[World]:
    """Serves until the block ends; adapters are loaded from below `allowed`."""
    model = save_tiny_model(root / "model")
    config = ServerConfig(
        engine=EngineConfig(
            model=ModelConfig(model=str(model), dtype="float32", device="cpu"),
            cache=CacheConfig(kv_cache_memory=8 * MIB),
            lora=LoRALimits(lora_memory=8 * MIB, cpu_lora_memory=64 * MIB),
        ),
        adapters=AdapterConfig(state_dir=root / "state", allowed_roots=(allowed,)),
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


def mlx_folder(twin: Path, folder: Path) -> Path:
    """MLX stores both matrices the other way round and multiplies by `scale` itself."""
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
    return folder
