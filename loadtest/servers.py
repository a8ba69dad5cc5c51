"""Servers as processes: started on a free port, waited for, held still, stopped by their own id. Ours and the peers'.

Each has a process group of its own, so that one signal reaches all its processes. Knows nothing of what is sent.
"""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loadtest.client import LoadTestFailed

_START_SECONDS = 300  # the first start of all converts the default model
_STOP_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Server:
    """A running one."""

    url: str
    process: "subprocess.Popen[bytes]"

    def hold(self) -> None:
        """Stop it from running at all: one that only waits may still poll, at the cost of who is being measured."""
        self._signal(signal.SIGSTOP)

    def release(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is not None:
            raise LoadTestFailed(f"{self.process.args!r} ended with {self.process.returncode} while it was measured")
        os.killpg(self.process.pid, number)


@contextmanager
def running(
    command: Sequence[str],
    *,
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    start_seconds: float = _START_SECONDS,
) -> Iterator[Server]:
    """Run a server that answers GET /health once it is ready."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", process)
            _wait_until_healthy(server, log, start_seconds)
            yield server
        finally:
            _stop(process)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait_until_healthy(server: Server, log: Path, start_seconds: float) -> None:
    process, deadline = server.process, time.monotonic() + start_seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LoadTestFailed(f"{process.args!r} ended with {process.returncode}; its last words:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise LoadTestFailed(f"{server.url} was not healthy after {start_seconds:.0f} s; its last words:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the whole group: asked first, so that a server takes its own children down; then made to."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGCONT)  # a held one hears nothing
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):  # nobody was left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
