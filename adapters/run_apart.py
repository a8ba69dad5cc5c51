"""Runs a function on bytes in a process of its own: for what would hold this interpreter's lock, and with it every
stream, until it is done, or could end the process.

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
    "import sys; sys.path.append(sys.argv[1]); from importlib import import_module; "
    "sys.stdout.buffer.write(import_module(sys.argv[2]).answer(sys.stdin.buffer.read()))"
)


class DiedApart(Exception):
    """The process was ended, or came to no end: what it was given is not to be tried in this one."""


def run_apart(module: str, data: bytes) -> bytes | None:
    """What `module.answer(data)` returns; None when no process could be started, or it raised. Raises DiedApart."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as answer:  # a pipe is filled by 512 bytes a turn
        given.write(data)
        given.seek(0)
        command = [sys.executable, "-I", "-c", _PROGRAM, str(_ROOT), module]
        try:
            ended = subprocess.run(
                command, stdin=given, stdout=answer, stderr=subprocess.DEVNULL, timeout=_WALL_SECONDS, check=False
            )
        except OSError:
            return None
        except subprocess.TimeoutExpired:
            raise DiedApart(f"it took longer than {_WALL_SECONDS} s") from None
        if ended.returncode < 0:
            raise DiedApart(f"the process that did was ended by signal {-ended.returncode}")
        answer.seek(0)
        return answer.read(_MAX_ANSWER_BYTES) if ended.returncode == 0 else None
