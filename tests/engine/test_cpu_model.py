"""How the CPU's threads are shared out between torch and our kernels."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.ops import bf16_dot
from adapters.ops.thread_team import current_team, start_team
from server.config import ModelConfig
from server.engine import cpu_model
from server.engine.base_model import load_base_model


@pytest.fixture(autouse=True)
def keep_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2})
    torch_threads, team_threads = torch.get_num_threads(), current_team().num_threads
    yield
    torch.set_num_threads(torch_threads)
    start_team(team_threads)


@pytest.mark.parametrize(("wanted", "environment", "expected"), [(None, None, 3), (2, "1", 2), (None, "2,1", 2)])
def test_our_products_leave_torch_one_thread(wanted: int | None, environment: str | None, expected: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if environment is not None:
            patch.setenv("OMP_NUM_THREADS", environment)
        team = cpu_model._share_out_threads(wanted, own_product=True)
    assert (team.num_threads, torch.get_num_threads()) == (expected, 1)


@pytest.mark.parametrize(("wanted", "expected"), [(None, 2), (3, 3)])
def test_torch_s_products_leave_our_team_one_thread_and_connections_a_core(wanted: int | None, expected: int) -> None:
    team = cpu_model._share_out_threads(wanted, own_product=False)
    assert (team.num_threads, torch.get_num_threads()) == (1, expected)


def test_a_number_that_is_none_is_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert cpu_model._share_out_threads(None, own_product=True).num_threads == 3


@pytest.mark.skipif(
    not bf16_dot.is_supported() or sys.platform != "linux", reason="weights are packed with AVX512-BF16"
)
def test_a_packed_model_does_not_keep_its_file_in_memory(tmp_path: Path) -> None:
    """Nor does it change by that: the tied embedding is the same parameter, and gives the same logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).bfloat16()
    plain.save_pretrained(tmp_path)
    base = load_base_model(tmp_path, "tiny", ModelConfig())
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    embedding = base.model.get_input_embeddings().weight
    assert torch.equal(embedding, plain.get_input_embeddings().weight)
    assert base.weight_bytes == sum(p.numel() * p.element_size() for p in plain.parameters())
