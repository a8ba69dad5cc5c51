"""Adapters as training would leave them: PEFT's own files, every trainable tensor moved away from where it began."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from tests.conformance.models import fresh

STD = 0.05


def base_of(architecture: str, vocab_size: int | None) -> nn.Module:
    """A fresh base, its vocabulary of another size where that is said; new rows are the same each time."""
    model: Any = fresh(architecture)
    if vocab_size is not None:
        torch.manual_seed(5)
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        model.requires_grad_(False)
    return model.eval()


def train(architecture: str, config: PeftConfig, folder: Path, *, seed: int, vocab_size: int | None = None) -> Path:
    """PEFT's B = 0 would let every test pass, so everything that trains is moved."""
    torch.manual_seed(seed)
    model: Any = get_peft_model(base_of(architecture, vocab_size), config)
    move(model, seed)
    keep = {"save_embedding_layers": True} if vocab_size is not None else {}
    model.save_pretrained(folder, **keep)
    return folder


def move(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert moved, "nothing trains"
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(torch.randn_like(parameter) * STD)
