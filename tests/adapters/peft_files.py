"""Adapters that PEFT makes of a tiny random model, read back as readers of formats see them, beside PEFT's own layers.

Nothing of ours is between: PEFT writes the folder, safetensors reads the tensors, PEFT's layers say what they compute.
"""

import copy
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from adapters.proposal import PairProposal, Proposal
from adapters.propose import propose
from adapters.recipe import Recipe, read_recipe
from adapters.safetensors_header import TensorEntry, parse_header

TINY = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PREFIX = "base_model.model."
LAYER = "model.layers.0."


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, **HEADS, tie_word_embeddings=tied))


def qwen2() -> Qwen2ForCausalLM:
    """With biases of q, k and v."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**TINY, **HEADS, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


@dataclass(frozen=True, slots=True)
class Saved:
    """A folder that PEFT wrote, and the model that PEFT loads from it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    entries: dict[str, TensorEntry]
    model: PeftModel

    @property
    def recipe(self) -> Recipe:
        return read_recipe(json.dumps(self.config).encode())

    def propose(self) -> Proposal:
        return propose(self.recipe, self.entries)

    def layer(self, module: str) -> Any:
        """PEFT's layer, by the module's name in the base."""
        return self.model.base_model.model.get_submodule(module)


def save(
    folder: Path, config: PeftConfig, *, base: Callable[[], nn.Module] = llama, loaded: bool = True, **options: Any
) -> Saved:
    """`config` on `base`, every trained value random, saved; the model is what PEFT loads again unless not `loaded`."""
    torch.manual_seed(1)
    model = get_peft_model(base(), copy.deepcopy(config))
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(str(folder), **options)
    again = PeftModel.from_pretrained(base(), str(folder)) if loaded else model
    weights = folder / "adapter_model.safetensors"
    config_read = json.loads((folder / "adapter_config.json").read_text())
    return Saved(config_read, load_file(weights), entries_of(weights), again.eval())


def entries_of(path: Path) -> dict[str, TensorEntry]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return parse_header(data[8 : 8 + length], data_bytes=len(data) - 8 - length, what=path.name)


def header_of(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, TensorEntry]:
    """Entries of tensors of these shapes, through a real file."""
    path = folder / "made.safetensors"
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, path)
    return entries_of(path)


def delta(pair: PairProposal, tensors: Mapping[str, Tensor], base: nn.Linear) -> Tensor:
    """s · B · A [out, in] as the pair proposes it, in float32; the shapes it declares must be true."""
    stored = [tensors[name].float() for name in pair.inputs]
    if pair.fold is None:
        lora_a, lora_b = stored
    else:
        assert isinstance(pair.fold, partial) or pair.fold.__module__ == "adapters.folds"
        lora_a, lora_b = pair.fold(stored, base.in_features, base.out_features)
    assert lora_a.shape == (pair.lora_rank, base.in_features)
    assert lora_b.shape == (base.out_features, pair.lora_rank)
    assert pair.in_features in (None, base.in_features)
    assert pair.fits is None or pair.fits(base.in_features, base.out_features)
    assert pair.out_features in (None, base.out_features)
    return pair.scale * (lora_b @ lora_a)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """To a millionth of the largest value, which is not 0."""
    largest = theirs.abs().max().item()
    assert largest > 1e-3
    assert (ours - theirs).abs().max().item() <= 1e-6 * largest


def consumed(proposal: Proposal) -> list[str]:
    """Every name the proposal gives, as often as it does."""
    names = [name for pair in proposal.pairs for name in (*pair.inputs, pair.magnitude, pair.bias) if name]
    names += [n for e in proposal.embeddings for n in (e.lora_a, e.lora_b, e.magnitude) if n]
    names += [vector.input for vector in proposal.vectors] + [tokens.input for tokens in proposal.tokens]
    names += [name for whole in proposal.wholes for name in (whole.weight, whole.bias) if name]
    return names + list(proposal.dropped)
