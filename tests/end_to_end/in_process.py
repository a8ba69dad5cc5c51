"""A whole server, as the command line starts it, in a thread of this process, on a tiny model.

What a test can do here and not to a process of its own: ask engine and adapters for their integrity, and break their
code. Stopped by the event that the first SIGTERM would set.
"""

import asyncio
import io
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
import transformers as hf
from rich.console import Console

from server import serve as serve_module
from server.api.context import ServerContext
from server.config import ServerConfig
from tests.server.fakes import byte_level_tokenizer

_Result = TypeVar("_Result")


def save_tiny_model(folder: Path) -> Path:
    """A random Llama with a tokenizer: answers differ by prompt and by adapter, and mean nothing."""
    tokenizer = byte_level_tokenizer()._hf  # transformers' own, which knows how to save itself
    config = hf.LlamaConfig(
        vocab_size=448,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class InProcessServer:
    url: str
    context: ServerContext
    loop: asyncio.AbstractEventLoop

    def on_loop(self, call: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
        """Run a coroutine on the server's loop, where names, leases and streams may be touched."""
        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(60)

    def check_integrity(self) -> None:
        """Raises AssertionError when engine or adapters are at odds with themselves."""

        async def check() -> None:
            await self.context.engine.check_integrity()  # type: ignore[attr-defined]
            self.context.adapters.check_integrity()

        self.on_loop(check)


@contextmanager
def in_process(config: ServerConfig) -> Iterator[InProcessServer]:
    """Serve until the block ends; whatever `serve` raised is raised here."""
    made: dict[str, Any] = {}
    started, failures = threading.Event(), list[BaseException]()

    def create_app(context: ServerContext) -> Any:
        made.update(context=context, loop=asyncio.get_running_loop())
        return real_create_app(context)

    def stop_events() -> tuple[asyncio.Event, asyncio.Event]:
        made["stop"] = asyncio.Event()
        return made["stop"], asyncio.Event()

    def run() -> None:
        try:
            serve_module.serve(config, Console(file=io.StringIO()))
        except BaseException as error:
            failures.append(error)
        finally:
            started.set()

    real_create_app = serve_module.create_app
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_module, "create_app", create_app)
        patch.setattr(serve_module, "_stop_events", stop_events)
        thread = threading.Thread(target=run, name="server", daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{config.http.port}"
        _wait_until_healthy(url, thread, failures)
        try:
            yield InProcessServer(url, made["context"], made["loop"])
        finally:
            made["loop"].call_soon_threadsafe(made["stop"].set)
            thread.join(60)
            assert not thread.is_alive(), "the server did not stop"
            if failures:
                raise failures[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(url: str, thread: threading.Thread, failures: list[BaseException]) -> None:
    while thread.is_alive():
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.02)
    raise failures[0] if failures else RuntimeError("the server ended before it started")
