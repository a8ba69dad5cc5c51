"""Reads a pickled checkpoint through a process that can do nothing else (`pickle_child.py`).

Of that process only a file of tensors is taken, read with the same strict parser as every adapter, and one line of
text, shown as text. Never used by the server, which refuses pickles.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from adapters.convert.failure import CannotConvert
from adapters.convert.stored_tensors import read_tensors
from adapters.errors import AdapterRefused
from adapters.untrusted_json import parse_object, shown

_WALL_SECONDS = 900
_MAX_REPORT_BYTES = 4096
_ROOT = Path(__file__).parents[2]
_START = "import sys; sys.path.append(sys.argv[1]); from adapters.convert.pickle_child import main; main()"


@dataclass(frozen=True, slots=True)
class ReadPickle:
    tensors: dict[str, Tensor]
    has_own_network: bool  # else only the want of descriptors keeps the process from the network


def read_pickle(path: Path) -> ReadPickle:
    """The tensors in the checkpoint at `path`. Raises CannotConvert with what in it is refused."""
    with path.open("rb") as source, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as report:
        status = _run_child(source, output, report)
        report.seek(0)
        said = _parsed(report.read(_MAX_REPORT_BYTES))
        if status != 0 or "error" in said:
            raise CannotConvert(_why(path, status, said))
        return ReadPickle(read_tensors(output, path.name), said.get("network_namespace") is True)


def _run_child(source: BinaryIO, output: BinaryIO, report: BinaryIO) -> int:
    """The exit status; negative: the signal that ended it."""
    child = [sys.executable, "-I", "-c", f"import os; os.dup2({output.fileno()}, 3); {_START}", str(_ROOT)]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    try:
        return subprocess.run(
            child,
            stdin=source,
            stdout=report,
            stderr=subprocess.DEVNULL,
            pass_fds=[output.fileno()],
            env=environment,
            cwd="/",
            timeout=_WALL_SECONDS,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return 1


def _parsed(line: bytes) -> dict[str, object]:
    try:
        return parse_object(line, what="the report of the process that reads pickles")
    except AdapterRefused:
        return {}


def _why(path: Path, status: int, said: dict[str, object]) -> str:
    if "error" in said:
        why = shown(said["error"], 400)
    elif status < 0:
        why = f"the process that read it was ended by signal {-status}: it took too much time, memory or disk"
    else:
        why = "the process that read it came to no end"
    return (
        f"{path.name} is not a checkpoint of plain tensors: {why}. If it is trusted, load it where it was made and "
        "save its tensors as safetensors"
    )
