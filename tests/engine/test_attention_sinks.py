"""Attention sinks: the reference against their definition, the CPU backend against it, and a model that has them."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from server.config import ModelConfig
from server.engine import probe
from server.engine.attention import reference, select_backend
from server.engine.attention.interface import attention
from server.engine.base_model import ModelRefused, load_base_model
from tests.engine.attention_step import TOLERANCE, make_step
from tests.equivalence.architectures import VOCAB

ROWS = [(1, 0), (1, 40), (7, 0), (5, 30)]


def test_a_sink_is_a_token_without_value_that_every_query_sees() -> None:
    """Its score is q · k of a key made for that, its value 0; the reference knows only the score."""
    queries, keys, values = torch.randn(3, 2, 8), torch.randn(5, 1, 8), torch.randn(5, 1, 8)
    sinks = torch.tensor([0.7, -1.0])
    visible = reference.visible_mask(3, 5, 4)
    got = reference.attend_dense(queries, keys, values, visible, scale=0.5, softcap=None, sinks=sinks)
    for head in range(2):
        scores = torch.cat([0.5 * queries[:, head] @ keys[:, 0].T, sinks[head].expand(3, 1)], 1)
        scores[:, :5][~visible] = -torch.inf
        want = scores.softmax(1) @ torch.cat([values[:, 0], torch.zeros(1, 8)])
        torch.testing.assert_close(got[:, head], want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sliding_window", "softcap"), [(None, None), (9, None), (20, 3.0)])
def test_cpu_agrees_with_the_reference(dtype: torch.dtype, sliding_window: int | None, softcap: float | None) -> None:
    step = make_step(ROWS, num_heads=6, num_kv_heads=2, head_dim=32, dtype=dtype)
    sinks = torch.tensor([-torch.inf, -30.0, 0.0, 2.5, 8.0, 60.0]).to(dtype)
    got, want = (
        backend(
            step.q, step.k, step.v, step.layer, step.metadata,
            scale=0.2, sliding_window=sliding_window, softcap=softcap, sinks=sinks,
        )
        for backend in (select_backend(torch.device("cpu")), reference.attend)
    )  # fmt: skip
    assert (got.float() - want.float()).abs().max().item() <= TOLERANCE[dtype]


def gpt_oss(folder: Path) -> Path:
    """A tiny model whose sinks weigh."""
    config = hf.GptOssConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=4,
        max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=2.0 if "sinks" in name else 0.3)
    model.save_pretrained(folder)
    return folder


def test_a_model_with_sinks_passes_the_probe_and_would_not_without_them(tmp_path: Path) -> None:
    base = load_base_model(gpt_oss(tmp_path), "gpt-oss", ModelConfig(device="cpu", dtype="float32"))
    assert probe.check(base) < 1e-5
    backend = base.context.backend

    def dropping(*args: object, sinks: torch.Tensor, **rest: object) -> torch.Tensor:
        return backend(*args, **rest)  # type: ignore[arg-type]

    base.context.backend = dropping  # type: ignore[assignment]
    with pytest.raises(ModelRefused, match="relative error"):
        probe.check(base)


def test_a_bias_on_scores_is_refused_by_name() -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="Linear adds a position bias of"):
        attention(nn.Linear(1, 1), x, x, x, None, position_bias=torch.zeros(1, 1, 2, 2))
