"""What is printed when the server is ready: the facts, on a terminal or not, and a command that a shell can run."""

import io
import json
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from adapters.adapter_ref import AdapterRef, AdapterVersion
from adapters.module_names import BaseModules
from server.async_engine import EngineInfo
from server.config import HTTPConfig, ServerConfig
from server.engine.engine import EngineMemory
from server.engine.live_weights import LiveWeights
from server.startup_panel import Started, curl_command, show

_INFO = EngineInfo(
    model_name="tiny",
    model_type="llama",
    max_model_len=2048,
    vocab_size=64,
    num_embeddings=64,
    dtype=torch.bfloat16,
    device="cpu",
    eos_token_ids=frozenset({2}),
    base=BaseModules("llama", {}),
    block_size=16,
    memory=EngineMemory(weights=2**28, kv_cache=2**30, lora_pools=2**29, num_blocks=100, lora_rows=512),
    weights=LiveWeights(lambda: nn.Linear(2, 2), "none"),
    folder=Path(),
)


def _started(num_adapters: int = 1, **http: str) -> Started:
    return Started(
        config=ServerConfig(http=HTTPConfig(**http)),
        info=_INFO,
        model_name="tiny",
        adapters=[
            AdapterRef(
                name=f"a{i}", version=AdapterVersion("ab" * 32), source="/a", lora_rank=8, num_bytes=2048, modules=()
            )
            for i in range(num_adapters)
        ],
        url="http://127.0.0.1:8000",
        seconds=4.2,
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_says_what_is_served_and_where_memory_went(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    show(_started(), console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    for fact in ("ready in 4.2 s at http://127.0.0.1:8000", "llama, bfloat16, cpu, 2048 tokens", "256 MiB"):
        assert fact in out
    for fact in ("1 GiB: 100 blocks of 16, 1600 tokens", "512 MiB: 512 rows", "a0 (rank 8, 2 KiB, abababababab)"):
        assert fact in out


def test_many_adapters_are_not_all_listed() -> None:
    console = Console(file=io.StringIO(), width=200)
    show(_started(40), console)
    assert "and 28 more" in console.file.getvalue()  # type: ignore[attr-defined]


def test_curl_line_is_one_a_shell_can_run() -> None:
    words = shlex.split(curl_command(_started()))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/completions"]
    assert json.loads(words[-1])["model"] == "a0"


def test_keys_are_named_and_never_shown() -> None:
    console = Console(file=io.StringIO(), width=200)
    started = _started(api_key="very-secret", admin_api_key="more-secret")
    show(started, console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "one for inference, one for adapters" in out
    assert "$LORAMUX_API_KEY" in out
    assert "secret" not in out
