"""What a person sees when the server is ready: what is served, where the memory went, and a line to try.

A panel on a terminal, the same facts as plain lines elsewhere. Only prints; starts and measures nothing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from adapters.adapter_ref import AdapterRef
from server.async_engine import EngineInfo
from server.config import ServerConfig
from server.memory_size import format_memory

_MAX_LISTED = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A server that has begun to answer."""

    config: ServerConfig
    info: EngineInfo
    model_name: str
    adapters: Sequence[AdapterRef]
    url: str
    seconds: float  # from the start of the process to the first request it can take


def show(started: Started, console: Console) -> None:
    rows = list(_rows(started))
    title = f"loramux is ready in {started.seconds:.1f} s at {started.url}"
    command = curl_command(started)
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row(Text(name, style="bold"), Text(value))
        console.print(Panel(table, title=title, expand=False))
    else:
        console.print(title, highlight=False, soft_wrap=True)
        for name, value in rows:
            console.print(f"  {name}: {value}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Try:\n{command}", highlight=False, markup=False, soft_wrap=True)


def curl_command(started: Started) -> str:
    """One line that streams an answer, from the first adapter when there is one."""
    model = started.adapters[0].name if started.adapters else started.model_name
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 40, "stream": True}
    key = ' -H "Authorization: Bearer $LORAMUX_API_KEY"' if started.config.http.api_key else ""
    return f"curl -N {started.url}/v1/completions{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def _rows(started: Started) -> Iterator[tuple[str, str]]:
    info, memory = started.info, started.info.memory
    dtype = str(info.dtype).removeprefix("torch.")
    yield "model", f"{started.model_name} ({info.model_type}, {dtype}, {info.device}, {info.max_model_len} tokens)"
    yield "weights", format_memory(memory.weights)
    tokens = memory.num_blocks * info.block_size
    yield (
        "KV cache",
        f"{format_memory(memory.kv_cache)}: {memory.num_blocks} blocks of {info.block_size}, {tokens} tokens",
    )
    yield "adapter pools", f"{format_memory(memory.lora_pools)}: {memory.lora_rows} rows, one per rank of an adapter"
    for adapter in started.adapters[:_MAX_LISTED]:
        size = format_memory(adapter.num_bytes)
        yield "adapter", f"{adapter.name} (rank {adapter.lora_rank}, {size}, {adapter.version[:12]})"
    if len(started.adapters) > _MAX_LISTED:
        yield "adapters", f"and {len(started.adapters) - _MAX_LISTED} more: loramux adapters ls"
    yield "state", _state(started.config)
    yield "keys", _keys(started.config)


def _state(config: ServerConfig) -> str:
    folder = config.adapters.state_dir
    return "temporary, gone at exit; --state-dir keeps adapters and names" if folder is None else str(folder)


def _keys(config: ServerConfig) -> str:
    if config.http.api_key is None:
        return "none, open to this machine only"
    return "one for all routes" if config.http.admin_api_key is None else "one for inference, one for adapters"
