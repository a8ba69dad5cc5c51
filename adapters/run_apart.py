"""Runs a function on bytes in a process of its own: for what would hold this interpreter's lock, and with it every
stream, until it is done, and for what may end the process that it runs in.

Of that process one answer is taken, bytes like any others. Knows nothing of what it computes.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

LARGE = 1 << 20
"""Bytes of JSON that take tens of milliseconds; below, starting a process costs more than it spares the streams."""

_WALL_SECONDS = 120
_MAX_ANSWER_BYTES = 64 << 10
_ROOT = Path(__file__).parents[1]
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from importlib import import_module; "
    "sys.stdout.buffer.write(import_module(sys.argv[2]).answer(sys.stdin.buffer.read()))"
)


class CameToNoEnd(Exception):
    """The process was started and gave no answer; the message says how it ended."""


def run_apart(module: str, data: bytes) -> bytes | None:
    """What `module.answer(data)` returns; None when no process could be started. Raises CameToNoEnd."""
    try:
        return _answer(module, data)
    except subprocess.TimeoutExpired:
        raise CameToNoEnd(f"no end within {_WALL_SECONDS} s") from None
    except OSError:
        return None


def _answer(module: str, data: bytes) -> bytes:
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as answer:  # a pipe is filled by 512 bytes a turn
        given.write(data)
        given.seek(0)
        command = [sys.executable, "-I", "-c", _PROGRAM, str(_ROOT), module]
        ended = subprocess.run(
            command, stdin=given, stdout=answer, stderr=subprocess.DEVNULL, timeout=_WALL_SECONDS, check=False
        )
        if ended.returncode != 0:
            how = f"signal {-ended.returncode}" if ended.returncode < 0 else f"status {ended.returncode}"
            raise CameToNoEnd(f"its process ended with {how}")
        answer.seek(0)
        return answer.read(_MAX_ANSWER_BYTES)
