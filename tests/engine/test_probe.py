"""The load-time probe refuses by name what it cannot serve exactly, and passes what it can."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from server.config import ModelConfig
from server.engine import probe
from server.engine.base_model import BaseModel, ModelRefused, load_base_model
from tests.equivalence.architectures import CONFIGS, VOCAB, save


def load(folder: Path, **settings: object) -> BaseModel:
    return load_base_model(folder, folder.name, ModelConfig(device="cpu", **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_passes_what_is_exact(architecture: str, tmp_path: Path) -> None:
    base = load(save(architecture, tmp_path / architecture))
    assert probe.check(base) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        hf.GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
        hf.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False),
    ],
    ids=lambda config: str(config.model_type),
)
def test_refuses_architectures_that_pass_our_attention_by(config: hf.PreTrainedConfig, tmp_path: Path) -> None:
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelRefused, match="not served"):
        load(tmp_path / "model", max_model_len=64)


def test_refuses_attention_that_computes_something_else(tmp_path: Path) -> None:
    base = load(save("llama", tmp_path / "llama"))
    backend = base.context.backend

    def planted(*args: Tensor, scale: float, **rest: object) -> Tensor:
        return backend(*args, scale=scale * 1.05, **rest)  # type: ignore[arg-type]

    base.context.backend = planted  # type: ignore[assignment]
    with pytest.raises(ModelRefused, match="relative error"):
        probe.check(base)


def test_long_rope_is_pinned_by_the_model_length(tmp_path: Path) -> None:
    """Phi-3 switches its frequencies on the longest position of the whole batch; ours may not."""
    half = 6
    config = hf.Phi3Config(
        vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=256, original_max_position_embeddings=32, pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * half, "long_factor": [4.0] * half,
            "original_max_position_embeddings": 32,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "phi3")
    short, long = load(tmp_path / "phi3", max_model_len=32), load(tmp_path / "phi3", max_model_len=256)
    frequencies = [
        next(m for m in base.model.modules() if hasattr(m, "rope_type")).inv_freq.clone() for base in (short, long)
    ]
    assert torch.allclose(frequencies[0], 4.0 * frequencies[1])  # type: ignore[arg-type, operator]
    for base in (short, long):
        probe.check(base)


def test_max_model_len_over_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="--max-model-len 300 is over the 256 positions"):
        load(save("llama", tmp_path / "llama"), max_model_len=300)
