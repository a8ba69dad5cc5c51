"""Which release of everything took part, asked of each by its own means. Knows nothing of measuring."""

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from loadtest.peers_endpoints import LLAMA_CPP, PEFT, VLLM, Programs

_OURS = ("torch", "transformers", "numba")
_VLLM_QUERY = "from importlib.metadata import version as v; print(v('vllm'), v('torch'), v('transformers'))"
_SECONDS = 60


def versions_of(names: Sequence[str], programs: Programs) -> dict[str, str]:
    """Name → version, of ours and of the peers among `names`."""
    found = {"Python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _OURS}}
    if LLAMA_CPP in names and programs.llama_server is not None:
        found[LLAMA_CPP] = _llama_cpp(programs.llama_server)
    if VLLM in names and programs.vllm_python is not None:
        vllm, torch, transformers = _output([str(programs.vllm_python), "-c", _VLLM_QUERY]).split()
        found[VLLM] = f"{vllm} (torch {torch}, transformers {transformers})"
    if PEFT in names:
        found[PEFT] = importlib.metadata.version("peft")
    return found


def _llama_cpp(binary: Path) -> str:
    said = re.search(r"version: (.+)", _output([str(binary), "--version"], library_path=binary.parent))
    return "of unknown version" if said is None else said.group(1)


def _output(command: list[str], library_path: Path | None = None) -> str:
    environment = None if library_path is None else {"LD_LIBRARY_PATH": str(library_path)}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        check=True,
        timeout=_SECONDS,
    )
    return done.stdout
