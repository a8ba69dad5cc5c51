"""Ways to make an adapter and its judge: by PEFT, by PEFT and then written anew, or by hand with dense weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conformance.oracle import Oracle, PeftOracle
from tests.conformance.training import base_of, move, train
from tests.conformance.traits import Traits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """One adapter of one architecture, ready to be served and to be judged."""

    folder: Path
    oracle: Oracle
    vocab_size: int | None = None  # of the base it was trained on, where it is not the base's


@dataclass
class Files:
    """What a folder holds, to be changed and written."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Files":
        return cls(json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS))

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config))
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / WEIGHTS)


Make = Callable[[Traits, Path], Adapter]
Rewrite = Callable[[Files, Path], None]  # changes the files of PEFT and writes them into the folder


def lora(traits: Traits, *also: str, **changes: Any) -> LoraConfig:
    """LoRA on all linears of the text model, and on what else is named."""
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **traits.targeting(*also)}
    return LoraConfig(**{**settings, **changes})


def by_peft(config: Callable[[Traits], PeftConfig], *, resized: int = 0) -> Make:
    """Trained by PEFT, judged by PEFT."""

    def make(traits: Traits, folder: Path) -> Adapter:
        vocab_size = traits.vocab_size + resized if resized else None
        train(traits.architecture, config(traits), folder, seed=seed_of(folder), vocab_size=vocab_size)
        invocation = tuple(getattr(config(traits), "alora_invocation_tokens", None) or ())
        return Adapter(folder, PeftOracle(traits.architecture, folder, vocab_size, invocation), vocab_size)

    return make


def plain(**changes: Any) -> Make:
    return by_peft(lambda t: lora(t, **changes))


def rewritten(source: Make, rewrite: Rewrite) -> Make:
    """The same adapter in another spelling: what PEFT wrote is judged, what `rewrite` makes of it is served."""

    def make(traits: Traits, folder: Path) -> Adapter:
        original = source(traits, folder.with_name(f"{folder.name}-by-peft"))
        folder.mkdir()
        rewrite(Files.read(original.folder), folder)
        return Adapter(folder, original.oracle, original.vocab_size)

    return make


def altered(source: Make, alter: Callable[[Files], None]) -> Make:
    """What PEFT wrote is changed, and both served and judged like that."""

    def make(traits: Traits, folder: Path) -> Adapter:
        adapter = source(traits, folder)
        files = Files.read(folder)
        alter(files)
        files.write(folder)
        return adapter

    return make


def converted(init: str) -> Make:
    """Trained on a base that the start replaced, and saved as PEFT converts it: plain, of twice the rank."""

    def make(traits: Traits, folder: Path) -> Adapter:
        torch.manual_seed(seed_of(folder))
        config = lora(traits, init_lora_weights=init)
        model: Any = get_peft_model(base_of(traits.architecture, None), config)
        start = folder.with_name(f"{folder.name}-start")
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = init
        move(model, seed_of(folder))
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start))
        return Adapter(folder, PeftOracle(traits.architecture, folder))

    return make


def seed_of(folder: Path) -> int:
    return sum(map(ord, folder.name))
